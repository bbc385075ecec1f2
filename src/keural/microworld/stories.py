"""Stories: somebody and a friend, a wish, what is in its way, a turn, and an end, with a few words that are spoken.

In: nothing. Out: a `Task`. Content is which plot is told of whom, of which friend and of which thing; how it is told is drawn,
beat by beat. Every beat is written in both languages, so that a story in one is the same story in the other. In Korean ``~`` after
a past stem is the ending: -다 in prose, -어요 and -어 in answers; a slot names its word and the particle that follows, as it is
after a consonant.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from random import Random

from keural.microworld import english, korean
from keural.microworld.content import PEOPLE, Noun, Split, Story, of_split
from keural.microworld.exercise import Answer, Exercise, Language, Task, korean_prompt

Line = tuple[str, str]
"""What is told in a beat, in English and in Korean."""
Beat = tuple[Line, ...]
"""Lines of which one is told; an empty one leaves the beat out."""

_LEFT_OUT = ("", "")
_PRONOUNS = {"he": ("he", "his", "him"), "she": ("she", "her", "her")}
_ENDINGS = {"plain": "다", "polite": "어요", "blunt": "어"}
_SLOT = re.compile(r"\{(who|h|f|t)([가-힣]*)\}")


@dataclass(frozen=True, slots=True)
class _Being:
    """Somebody of a story: a name of their own or an animal."""

    name: tuple[str, str]
    pronoun: str
    is_animal: bool = True

    @property
    def known(self) -> str:
        """Once spoken of: the rabbit, Mina."""
        return f"the {self.name[0]}" if self.is_animal else self.name[0]

    @property
    def new(self) -> str:
        """When first spoken of as somebody's friend: a rabbit, Mina."""
        return english.with_article(self.name[0]) if self.is_animal else self.name[0]

    @property
    def introduced(self) -> tuple[str, str]:
        """When a story begins with them: a little rabbit, a girl named Mina."""
        if self.is_animal:
            return f"a little {self.name[0]}", f"작은 {self.name[1]}"
        child = ("boy", "소년") if self.pronoun == "he" else ("girl", "소녀")
        return f"a {child[0]} named {self.name[0]}", f"{korean.with_particle(self.name[1], '이라는')} {child[1]}"


@dataclass(frozen=True, slots=True)
class _Plot:
    """What happens, beat by beat, with one of `things`."""

    things: tuple[Noun, ...]
    beats: tuple[Beat, ...]


_ANIMALS = (
    ("rabbit", "토끼", "she"), ("bear", "곰", "he"), ("fox", "여우", "she"), ("mouse", "생쥐", "he"), ("squirrel", "다람쥐", "she"),
    ("duck", "오리", "she"), ("cat", "고양이", "he"), ("dog", "개", "he"), ("frog", "개구리", "he"), ("deer", "사슴", "she"),
    ("hedgehog", "고슴도치", "he"), ("owl", "부엉이", "she"), ("goat", "염소", "he"), ("sheep", "양", "she"),
)  # fmt: skip
_CHILDREN = {"Minsu": "he", "Jia": "she", "Junho": "he", "Yuna": "she", "Mina": "she", "Jihun": "he"}
_BEINGS = {
    being.name[0]: being
    for being in (
        *(_Being((name, korean_name), pronoun) for name, korean_name, pronoun in _ANIMALS),
        *(_Being(person, _CHILDREN[person[0]], is_animal=False) for person in PEOPLE if person[0] in _CHILDREN),
    )
}
_HOMES: Beat = (
    ("by the river", "강가에"), ("in a quiet forest", "조용한 숲속에"), ("by the sea", "바닷가에"),
    ("on a green hill", "푸른 언덕에"), ("in a small village", "작은 마을에"), ("at the foot of a mountain", "산 아래에"),
    ("near a lake", "호숫가에"), ("at the end of a long road", "긴 길 끝에"), ("in a house with a red roof", "빨간 지붕 집에"),
)  # fmt: skip
_OPENING: tuple[Beat, ...] = (
    (
        ("Once upon a time there was {who} who lived {home}.", "옛날에 {home} {who이} 살았~."),
        ("{Who} lived {home}.", "{who이} {home} 살고 있었~."),
        ("Long ago, {who} lived {home}.", "오래전에 {home} {who이} 살고 있었~."),
        ("There was once {who} who lived {home}.", "옛날 옛적 {home} {who이} 있었~."),
    ),
    (
        _LEFT_OUT,
        _LEFT_OUT,
        ("{He} was small, but {he} was brave.", "{h은} 작지만 용감했~."),
        ("{He} liked to sing.", "{h은} 노래하기를 좋아했~."),
        ("{He} was kind to everyone.", "{h은} 누구에게나 친절했~."),
        ("{He} got up early every day.", "{h은} 날마다 일찍 일어났~."),
        ("{He} always had a question to ask.", "{h은} 언제나 궁금한 것이 많았~."),
    ),
    (
        ("{His} best friend was {af}.", "가장 친한 친구는 {f이었}~."),
        ("{Af} lived next door.", "옆집에는 {f이} 살았~."),
        ("{He} often played with {af}.", "{h은} {f과} 자주 놀았~."),
        ("{He} knew {af} well.", "{h은} {f과} 잘 아는 사이였~."),
    ),
)
_CLOSING: Beat = (
    ("From that day on, {h} and {f} were always together.", "그날부터 {h과} {f은} 언제나 함께였~."),
    ("{H} never forgot that day.", "{h은} 그날을 잊지 않았~."),
    ("They laughed and had supper together.", "둘은 웃으며 함께 저녁을 먹었~."),
    ("And they were good friends for a long time.", "그리고 둘은 오래오래 좋은 친구로 지냈~."),
    ("The next evening they sat under the stars and sang.", "다음 날 저녁 둘은 별을 보며 노래를 불렀~."),
)
_PLOTS = {
    "lost": _Plot(
        (
            Noun("ball", "공"),
            Noun("hat", "모자"),
            Noun("key", "열쇠"),
            Noun("doll", "인형"),
            Noun("book", "책"),
            Noun("umbrella", "우산"),
        ),
        (
            (
                ("One morning {h} could not find {his} {t}.", "어느 날 아침 {h은} 아끼던 {t을} 잃어버렸~."),
                (
                    "{H} had {at} that {he} loved. One day the {t} was gone.",
                    "{h}에게는 아끼는 {t이} 있었~. 그런데 어느 날 {t이} 사라졌~.",
                ),
                ('"Where is my {t}?" cried {h} one day.', '"내 {t이} 어디 갔지?" 어느 날 {h이} 외쳤~.'),
            ),
            (
                (
                    "{He} looked under the bed and behind the door, but it was not there.",
                    "침대 밑도 보고 문 뒤도 보았지만 {t은} 없었~.",
                ),
                (
                    "{He} looked everywhere until it was dark, but {he} found nothing.",
                    "어두워질 때까지 찾아보았지만 아무 데도 없었~.",
                ),
                ("{He} looked in every room. Then {he} sat down and cried.", "방마다 찾아보았~. 그러다가 주저앉아 울었~."),
            ),
            (
                (
                    '"Why are you sad?" asked {f}. "I lost my {t}," said {h}.',
                    '"왜 슬퍼?" {f이} 물었~. "{t을} 잃어버렸어." {h이} 말했~.',
                ),
                ('{F} came and said, "Let us look together."', '{f이} 와서 말했~. "같이 찾아보자."'),
                ('"Do not cry," said {f}. "I will help you."', '"울지 마. 내가 도와줄게." {f이} 말했~.'),
            ),
            (
                (
                    "They looked again, and {f} saw the {t} under a big tree.",
                    "둘은 다시 찾아보았~. {f이} 큰 나무 밑에서 {t을} 보았~.",
                ),
                (
                    "A bird had carried the {t} to the roof. {F} climbed up and brought it back.",
                    "새가 {t을} 지붕에 올려놓았~. {f이} 올라가서 {t을} 가지고 내려왔~.",
                ),
                ("The {t} was in the tall grass near the road.", "{t은} 길가의 풀밭에 있었~."),
            ),
            (
                ("{H} was very happy and thanked {f}.", "{h은} 아주 기뻐하며 {f}에게 고맙다고 했~."),
                ('"Thank you," said {h}. "You are a good friend."', '"고마워. 너는 좋은 친구야." {h이} 말했~.'),
            ),
        ),
    ),
    "gift": _Plot(
        (
            Noun("hat", "모자"),
            Noun("cup", "컵"),
            Noun("doll", "인형"),
            Noun("cake", "케이크"),
            Noun("bag", "가방"),
            Noun("picture", "그림"),
        ),
        (
            (
                (
                    "It was almost {f}'s birthday, and {h} wanted to give {f} {at}.",
                    "곧 {f}의 생일이었~. {h은} {f}에게 {t을} 주고 싶었~.",
                ),
                (
                    '"What do you want for your birthday?" asked {h}. "I want {at}," said {f}.',
                    '"생일에 무엇을 받고 싶어?" {h이} 물었~. "{t을} 받고 싶어." {f이} 대답했~.',
                ),
            ),
            (
                ("But {h} had no money.", "하지만 {h}에게는 돈이 없었~."),
                ("{He} went to the shop, but the door was closed.", "가게에 갔지만 문이 닫혀 있었~."),
                ("But there was not one {t} in the shop.", "하지만 가게에는 {t이} 하나도 없었~."),
            ),
            (
                (
                    '"Then I will make one," thought {h}, and {he} worked all night.',
                    '"그럼 내가 만들어야지." {h은} 이렇게 생각하고 밤새 만들었~.',
                ),
                ("{His} grandmother showed {him} how to make one.", "할머니가 {h}에게 만드는 법을 가르쳐 주었~."),
                ("{He} thought for a while and began to make one.", "{h은} 잠시 생각하다가 직접 만들기 시작했~."),
            ),
            (
                _LEFT_OUT,
                ("It was hard, but {he} did not stop.", "어려웠지만 {h은} 멈추지 않았~."),
                ("It took a long time, but at last the {t} was ready.", "오래 걸렸지만 마침내 {t이} 완성되었~."),
            ),
            (
                ('"It is the best {t} in the world!" said {f}.', '"세상에서 제일 좋은 {t이야}!" {f이} 말했~.'),
                ("When {f} saw the {t}, {f} smiled and hugged {h}.", "{f은} {t을} 보고 웃으며 {h을} 안아 주었~."),
                (
                    '"Did you make this for me?" asked {f}. "Yes," said {h}.',
                    '"나를 위해 만든 거야?" {f이} 물었~. "응." {h이} 대답했~.',
                ),
            ),
        ),
    ),
    "share": _Plot(
        (Noun("apple", "사과"), Noun("orange", "오렌지"), Noun("cake", "케이크"), Noun("pear", "배"), Noun("potato", "감자")),
        (
            (
                ("One day {h} had only one {t} to eat.", "어느 날 {h}에게는 먹을 것이 {t} 하나뿐이었~."),
                ("{H} was hungry and bought a big {t}.", "{h은} 배가 고파서 커다란 {t을} 샀~."),
                ("One morning {h} got {at} from {his} grandmother.", "어느 날 아침 {h은} 할머니에게 {t을} 받았~."),
            ),
            (
                ("Then {f} came. {F} had eaten nothing all day.", "그때 {f이} 왔~. {f은} 하루 종일 아무것도 먹지 못했~."),
                ('"I am so hungry," said {f}.', '"배가 너무 고파." {f이} 말했~.'),
                ('"What do you have there?" asked {f}. "{At}," said {h}.', '"그게 뭐야?" {f이} 물었~. "{t이야}." {h이} 대답했~.'),
            ),
            (
                ("{H} thought for a long time.", "{h은} 한참 생각했~."),
                ('"It is too small for two," thought {h}.', '"둘이 먹기에는 너무 작아." {h은} 이렇게 생각했~.'),
                _LEFT_OUT,
            ),
            (
                ("Then {he} cut the {t} in two and gave {f} one half.", "그러고는 {t을} 둘로 나누어 반쪽을 {f}에게 주었~."),
                ('"Let us eat it together," said {h}.', '"같이 먹자." {h이} 말했~.'),
                ("But {he} saw how sad {f} was and shared the {t}.", "하지만 슬퍼하는 {f을} 보고 {t을} 나누어 주었~."),
            ),
            (
                ("It tasted very good.", "{t은} 정말 맛있었~."),
                ("The next day {f} brought {h} some warm soup.", "다음 날 {f은} {h}에게 따뜻한 수프를 가져왔~."),
                ('"Now we are both happy," said {f}.', '"이제 우리 둘 다 행복해." {f이} 말했~.'),
            ),
        ),
    ),
    "fear": _Plot(
        (
            Noun("the dark", "어둠"),
            Noun("thunder", "천둥"),
            Noun("the water", "물"),
            Noun("the wind", "바람"),
            Noun("the old bridge", "낡은 다리"),
        ),
        (
            (
                ("But {h} was afraid of {t}.", "하지만 {h은} {t을} 무서워했~."),
                ("There was one thing that {h} was afraid of: {t}.", "{h이} 무서워하는 것이 하나 있었~. 바로 {t이었}~."),
            ),
            (
                (
                    '"Come with me," said {f}. "I cannot," said {h}. "I am afraid."',
                    '"나랑 같이 가자." {f이} 말했~. "안 돼. 나는 무서워." {h이} 대답했~.',
                ),
                ("Everyone laughed at {him}, and {he} stayed at home.", "모두가 놀려서 {h은} 집에만 있었~."),
                ("One evening {f} needed help, and {h} had to go out.", "어느 날 저녁 {f을} 도우러 {h이} 나가야 했~."),
            ),
            (
                ('{F} took {h} by the hand. "I am here," said {f}.', '{f이} {h}의 손을 꼭 잡았~. "내가 옆에 있어." {f이} 말했~.'),
                (
                    '"I was afraid, too," said {f}. "Let us sing a song."',
                    '"나도 전에는 무서웠어. 같이 노래를 부르자." {f이} 말했~.',
                ),
            ),
            (
                ("{H} took one step, and then another.", "{h은} 한 걸음, 또 한 걸음 나아갔~."),
                ("{H} closed {his} eyes and counted to ten.", "{h은} 눈을 감고 열까지 세었~."),
                ("{H} was still afraid, but {he} went on.", "{h은} 아직 무서웠지만 계속 걸어갔~."),
            ),
            (
                ('"I did it!" cried {h}.', '"해냈어!" {h이} 외쳤~.'),
                ("After that {h} was not afraid of {t} any more.", "그 뒤로 {h은} {t을} 무서워하지 않았~."),
                ('"That was not so bad," said {h}.', '"생각보다 괜찮네." {h이} 말했~.'),
            ),
        ),
    ),
    "rescue": _Plot(
        (Noun("hole", "구덩이"), Noun("well", "우물"), Noun("ditch", "도랑"), Noun("cave", "동굴")),
        (
            (
                ("One day {h} was walking home and heard a cry.", "어느 날 {h은} 집에 가다가 외치는 소리를 들었~."),
                ('"Help!" somebody called one afternoon.', '어느 날 오후 누군가 외쳤~. "도와줘!"'),
            ),
            (
                ("{F} had fallen into a deep {t}.", "{f이} 깊은 {t}에 빠져 있었~."),
                ("It was {f}, deep down in a {t}.", "{t} 깊은 곳에 {f이} 있었~."),
            ),
            (
                ("{H} could not reach {f}.", "{h}의 손은 {f}에게 닿지 않았~."),
                ("The {t} was deep, and nobody else was there.", "{t은} 깊었고 주위에는 아무도 없었~."),
                ("{H} called and called, but nobody came.", "{h은} 계속 불렀지만 아무도 오지 않았~."),
            ),
            (
                ("Then {h} found a long rope and tied it to a tree.", "그때 {h은} 긴 밧줄을 찾아 나무에 묶었~."),
                ("{H} ran to get a long branch.", "{h은} 달려가서 긴 나뭇가지를 가져왔~."),
                (
                    '"Wait, I have an idea," said {h}, and {he} brought a ladder.',
                    '"기다려, 좋은 생각이 있어." {h은} 사다리를 가져왔~.',
                ),
            ),
            (
                ("{F} held on, and {h} pulled and pulled.", "{f은} 꼭 붙잡았고 {h은} 힘껏 당겼~."),
                ("Slowly, slowly, {f} came out of the {t}.", "{f은} 천천히 {t}에서 나왔~."),
            ),
            (
                ('"You saved me," said {f}.', '"네가 나를 살렸어." {f이} 말했~.'),
                (
                    '"Are you all right?" asked {h}. "Yes, thank you," said {f}.',
                    '"괜찮아?" {h이} 물었~. "응, 고마워." {f이} 대답했~.',
                ),
            ),
        ),
    ),
    "garden": _Plot(
        (
            Noun("flower", "꽃"),
            Noun("tree", "나무"),
            Noun("pumpkin", "호박"),
            Noun("tomato", "토마토"),
            Noun("sunflower", "해바라기"),
        ),
        (
            (
                ("In spring {h} planted a seed and waited for {at}.", "봄에 {h은} 씨앗을 심고 {t이} 자라기를 기다렸~."),
                (
                    '{F} gave {h} a small seed. "It will be {at}," said {f}.',
                    '{f이} {h}에게 작은 씨앗을 주었~. "{t이} 될 거야." {f이} 말했~.',
                ),
                ("{H} wanted to have {at} in the garden.", "{h은} 마당에서 {t을} 키우고 싶었~."),
            ),
            (
                ("But it did not rain for a long time.", "하지만 오랫동안 비가 오지 않았~."),
                ("Many days passed, and nothing came out of the ground.", "여러 날이 지나도 싹이 나지 않았~."),
                ('"It will not grow here," said {f}.', '"여기서는 자라지 않을 거야." {f이} 말했~.'),
            ),
            (
                ("Every morning {h} carried water from the river.", "{h은} 아침마다 강에서 물을 길어 왔~."),
                (
                    '"I will wait," said {h}, and {he} watered the ground every day.',
                    '"나는 기다릴 거야." {h은} 이렇게 말하고 날마다 물을 주었~.',
                ),
            ),
            (
                ("Then one morning there was a small green leaf.", "그러던 어느 날 아침 작은 초록 잎이 나왔~."),
                ("At last the sun came out, and the plant began to grow.", "마침내 해가 나고 싹이 자라기 시작했~."),
            ),
            (
                ("In summer it was a big {t}.", "여름이 되자 커다란 {t이} 되었~."),
                ("{H} was proud and showed the {t} to {f}.", "{h은} 자랑스럽게 {f}에게 {t을} 보여 주었~."),
                ('"What a beautiful {t}!" said {f}.', '"정말 멋진 {t이야}!" {f이} 말했~.'),
            ),
        ),
    ),
    "quarrel": _Plot(
        (Noun("ball", "공"), Noun("book", "책"), Noun("doll", "인형"), Noun("bicycle", "자전거"), Noun("red chair", "빨간 의자")),
        (
            (
                ("One day {h} and {f} both wanted the same {t}.", "어느 날 {h과} {f은} 똑같은 {t을} 갖고 싶어 했~."),
                ("One day {h} and {f} found {at} in the street.", "어느 날 {h과} {f은} 길에서 {t을} 발견했~."),
            ),
            (
                (
                    '"It is mine!" cried {h}. "No, it is mine!" cried {f}.',
                    '"내 거야!" {h이} 외쳤~. "아니야, 내 거야!" {f이} 외쳤~.',
                ),
                ("{H} took the {t} and ran away.", "{h은} {t을} 가지고 달아났~."),
                ("{H} hid the {t} and said nothing.", "{h은} {t을} 숨기고 아무 말도 하지 않았~."),
            ),
            (
                ("They did not speak to each other for three days.", "둘은 사흘 동안 서로 말을 하지 않았~."),
                ("{F} went home and was sad.", "{f은} 슬퍼하며 집으로 갔~."),
                ("{H} played alone, but it was no fun.", "{h은} 혼자 놀았지만 재미가 없었~."),
            ),
            (
                ('Then {h} went to {f} and said, "I am sorry."', '그래서 {h은} {f}에게 가서 말했~. "미안해."'),
                ('"I am sorry," said {h}. "I am sorry, too," said {f}.', '"미안해." {h이} 말했~. "나도 미안해." {f이} 말했~.'),
            ),
            (
                ("After that they shared the {t}.", "그 뒤로 둘은 {t을} 함께 썼~."),
                (
                    '"You can have the {t} today," said {h}. "I can have it tomorrow."',
                    '"오늘은 네가 {t을} 써. 나는 내일 쓸게." {h이} 말했~.',
                ),
            ),
        ),
    ),
    "contest": _Plot(
        (
            Noun("running", "달리기"),
            Noun("swimming", "수영"),
            Noun("singing", "노래"),
            Noun("drawing", "그림"),
            Noun("dancing", "춤"),
            Noun("cooking", "요리"),
        ),
        (
            (
                ("There was a {t} contest, and {h} wanted to win.", "{t} 대회가 열렸~. {h은} 이기고 싶었~."),
                ('"Tomorrow is the {t} contest," said {f}.', '"내일은 {t} 대회 날이야." {f이} 말했~.'),
            ),
            (
                ("But {f} was better than everyone.", "하지만 {f이} 누구보다 잘했~."),
                ("But {h} was not good at it.", "하지만 {h은} 아주 서툴렀~."),
                ('"I can never win," said {h}.', '"나는 절대 못 이길 거야." {h이} 말했~.'),
            ),
            (
                ("So {he} practised from morning to night.", "그래서 아침부터 밤까지 연습했~."),
                ('"Practise with me," said {f}.', '"나랑 같이 연습하자." {f이} 말했~.'),
            ),
            (
                ("On the day of the contest {h} did {his} best.", "대회 날 {h은} 최선을 다했~."),
                ("On the day of the contest {f} was ill, and {h} stayed with {f}.", "대회 날 {f이} 아파서 {h은} {f}의 곁에 있었~."),
                ("On the day of the contest {h} was nervous, but {f} smiled at {him}.", "대회 날 {h은} 떨렸지만 {f이} 웃어 주었~."),
            ),
            (
                ("{H} did not win, but {he} was happy.", "이기지는 못했지만 {h은} 기뻤~."),
                ('"To me you are the best," said {f}.', '"나에게는 네가 최고야." {f이} 말했~.'),
            ),
        ),
    ),
    "visit": _Plot(
        (Noun("letter", "편지"), Noun("flower", "꽃"), Noun("cake", "케이크"), Noun("book", "책"), Noun("blanket", "담요")),
        (
            (
                (
                    "One winter {f} was ill, and {h} wanted to bring {f} {at}.",
                    "어느 겨울 {f이} 아팠~. {h은} {f}에게 {t을} 가져다주고 싶었~.",
                ),
                (
                    "{F} had not come out for a week. {H} took {at} and went to see {f}.",
                    "{f이} 일주일 동안 보이지 않았~. {h은} {t을} 가지고 {f을} 보러 갔~.",
                ),
            ),
            (
                ("On the way it began to rain.", "가는 길에 비가 내리기 시작했~."),
                ("But the bridge over the river was broken.", "그런데 강을 건너는 다리가 무너져 있었~."),
                ("But {h} lost the way.", "그런데 {h은} 길을 잃었~."),
            ),
            (
                ("An old turtle showed {him} another way.", "늙은 거북이가 다른 길을 알려 주었~."),
                ("{He} was tired, but {he} did not turn back.", "{h은} 지쳤지만 돌아가지 않았~."),
                ('"I must go on," said {h}.', '"계속 가야 해." {h이} 말했~.'),
            ),
            (
                ("At last {he} came to the house and knocked.", "마침내 {h은} 집에 도착해서 문을 두드렸~."),
                ("When it was dark {he} saw the light in {f}'s window.", "어두워졌을 때 {f}의 집 불빛이 보였~."),
            ),
            (
                ('"I feel better already," said {f}.', '"벌써 다 나은 것 같아." {f이} 말했~.'),
                ('"Did you come all this way for me?" asked {f}.', '"나를 보러 이렇게 먼 길을 온 거야?" {f이} 물었~.'),
                ("{F} was so happy with the {t} that {f} got up and danced.", "{f은} {t을} 받고 기뻐서 일어나 춤을 추었~."),
            ),
        ),
    ),
    "journey": _Plot(
        (
            Noun("the sea", "바다"),
            Noun("the city", "도시"),
            Noun("the castle", "성"),
            Noun("the waterfall", "폭포"),
            Noun("the lighthouse", "등대"),
        ),
        (
            (
                ("{H} had never seen {t}.", "{h은} {t을} 본 적이 없었~."),
                ("More than anything {h} wanted to see {t}.", "{h은} 무엇보다 {t을} 보고 싶었~."),
                ('"Have you ever seen {t}?" asked {h}. "No," said {f}.', '"{t을} 본 적 있어?" {h이} 물었~. "아니." {f이} 대답했~.'),
            ),
            (
                ('"It is too far," said everyone.', '"너무 멀어." 모두가 말했~.'),
                ("But the road was long, and nobody knew the way.", "하지만 길은 멀고 아무도 길을 몰랐~."),
            ),
            (
                ('"Let us go together," said {f}.', '"같이 가자." {f이} 말했~.'),
                ("So {h} packed some bread, and the two set out at sunrise.", "그래서 {h은} 빵을 싸고 둘은 해 뜰 때 길을 나섰~."),
            ),
            (
                ("They walked over hills and slept under trees.", "둘은 언덕을 넘고 나무 밑에서 잠을 잤~."),
                ("They were tired and their feet hurt.", "둘은 지치고 발도 아팠~."),
                ("A farmer gave them water and showed them the way.", "한 농부가 물을 주고 길을 알려 주었~."),
            ),
            (
                ("And then, on the third day, they saw {t}.", "그리고 사흘째 되는 날 {t이} 보였~."),
                ('"Look, there it is!" cried {f}.', '"저기 봐, 저기 있어!" {f이} 외쳤~.'),
            ),
            (_LEFT_OUT, ('"How beautiful it is!" said {h}.', '"정말 아름답다!" {h이} 말했~.')),
        ),
    ),
    "sound": _Plot(
        (Noun("kitten", "아기 고양이"), Noun("chick", "병아리"), Noun("puppy", "강아지"), Noun("baby bird", "아기 새")),
        (
            (
                ("One night {h} heard a strange sound outside.", "어느 날 밤 {h은} 밖에서 이상한 소리를 들었~."),
                ('"What was that?" said {h} one night.', '"무슨 소리지?" 어느 날 밤 {h이} 말했~.'),
            ),
            (
                ("{He} was scared and called {f}.", "{h은} 무서워서 {f을} 불렀~."),
                ('{F} came at once. "Is it a ghost?" asked {h}.', '{f이} 바로 왔~. "귀신일까?" {h이} 물었~.'),
            ),
            (
                ("They took a lamp and opened the door.", "둘은 등불을 들고 문을 열었~."),
                ('"Do not be afraid," said {f} and opened the door.', '"무서워하지 마." {f이} 말하며 문을 열었~.'),
            ),
            (
                ("It was only {at}. It was cold and hungry.", "문 앞에는 {t이} 있었~. 춥고 배고파 보였~."),
                ("There sat {at} in the rain.", "{t이} 비를 맞고 앉아 있었~."),
            ),
            (
                ("They gave it warm milk, and soon it was asleep.", "둘이 따뜻한 우유를 주자 {t은} 곧 잠들었~."),
                ('"You can stay with us," said {h} to the {t}.', '"우리와 함께 살자." {h이} {t}에게 말했~.'),
                ("In the morning they found its mother.", "아침이 되자 둘은 {t}의 엄마를 찾아 주었~."),
            ),
        ),
    ),
    "truth": _Plot(
        (Noun("cup", "컵"), Noun("bowl", "그릇"), Noun("lamp", "등불"), Noun("clock", "시계"), Noun("mirror", "거울")),
        (
            (
                ("One day {h} broke {f}'s {t}.", "어느 날 {h은} {f}의 {t을} 깨뜨렸~."),
                (
                    "{H} was playing at {f}'s house when the {t} fell down and broke.",
                    "{h이} {f}의 집에서 노는데 {t이} 떨어져 깨졌~.",
                ),
            ),
            (
                ("Nobody had seen it. {H} hid the pieces under the bed.", "아무도 보지 못했~. {h은} 조각을 침대 밑에 숨겼~."),
                (
                    '"Where is my {t}?" asked {f}. {H} said nothing.',
                    '"내 {t이} 어디 있지?" {f이} 물었~. {h은} 아무 말도 하지 않았~.',
                ),
                ('"It was the wind," said {h}.', '"바람이 그랬어." {h이} 말했~.'),
            ),
            (
                ("That night {he} could not sleep.", "그날 밤 {h은} 잠이 오지 않았~."),
                ("But {he} felt bad all day.", "하지만 {h은} 하루 종일 마음이 무거웠~."),
            ),
            (
                ('In the morning {he} said, "I broke it. I am sorry."', '다음 날 아침 {h은} 말했~. "내가 깨뜨렸어. 미안해."'),
                ("Then {he} told {f} everything.", "그래서 {h은} {f}에게 모두 이야기했~."),
            ),
            (
                ('"Thank you for telling me the truth," said {f}.', '"솔직하게 말해 줘서 고마워." {f이} 말했~.'),
                ('"It is only a {t}," said {f}. "You are my friend."', '"{t은} 괜찮아. 너는 내 친구야." {f이} 말했~.'),
            ),
        ),
    ),
}
_KOREAN_FRAMES = (
    ("{h} 이야기 해 주세요.", "{h} 이야기 해 줘."),
    ("{h과} {f} 이야기를 들려주세요.", "{h과} {f} 이야기를 들려줘."),
    ("이야기 하나 해 주세요.", "이야기 하나 해 줘."),
)
_ENGLISH_FRAMES = ("Tell me a story about {ah}.", "Tell me a story about {ah} and {af}.", "Tell me a story.")


@cache
def stories(split: Split) -> tuple[Story, ...]:
    """All stories of a split."""
    found = []
    for plot, told in _PLOTS.items():
        for hero in _BEINGS:
            friends = (friend for friend in _BEINGS if friend != hero)
            found += [Story(plot, hero, friend, thing) for friend in friends for thing in told.things]
    return of_split(found, split)


def _lines(rng: Random, story: Story) -> list[Line]:
    """What is told of a story, beat by beat; the home is the same in both languages."""
    home = rng.choice(_HOMES)
    chosen = [rng.choice(beat) for beat in (*_OPENING, *_PLOTS[story.plot].beats, _CLOSING)]
    return [(said.replace("{home}", home[0]), korean_said.replace("{home}", home[1])) for said, korean_said in chosen if said]


def _english_words(story: Story) -> Mapping[str, str]:
    """What stands in the slots of English lines; those with a capital begin a sentence."""
    hero, friend = _BEINGS[story.hero], _BEINGS[story.friend]
    he, his, him = _PRONOUNS[hero.pronoun]
    thing = story.thing.english
    small = {
        "who": hero.introduced[0], "h": hero.known, "ah": hero.new, "f": friend.known, "af": friend.new, "t": thing,
        "at": english.with_article(thing), "he": he, "his": his, "him": him,
    }  # fmt: skip
    return small | {slot.capitalize(): word[0].upper() + word[1:] for slot, word in small.items()}


def _korean_words(story: Story, line: str) -> str:
    """A Korean line with its slots filled; endings are still open."""
    hero = _BEINGS[story.hero]
    words = {"who": hero.introduced[1], "h": hero.name[1], "f": _BEINGS[story.friend].name[1], "t": story.thing.korean}

    def filled(slot: re.Match[str]) -> str:
        word, particle = words[slot[1]], slot[2]
        return korean.with_particle(word, particle) if particle else word

    return _SLOT.sub(filled, line)


def _told(story: Story, lines: list[Line], language: Language, style: str = "plain") -> str:
    """The story; `style` is that of Korean endings."""
    if language == "en":
        return " ".join(line[0] for line in lines).format_map(_english_words(story))
    return _korean_words(story, " ".join(line[1] for line in lines)).replace("~", _ENDINGS[style])


def _answer(story: Story, lines: list[Line], language: Language) -> Answer:
    return Answer(*(_told(story, lines, language, style) for style in ("polite", "blunt")))


def _exercise(rng: Random, split: Split, language: Language) -> Exercise:
    """A story that is asked for; wrong is the same one told from its end."""
    story = rng.choice(stories(split))
    lines = _lines(rng, story)
    if language == "ko":
        frame, polite = korean_prompt(rng, _KOREAN_FRAMES)
        prompt = _korean_words(story, frame)
    else:
        prompt, polite = rng.choice(_ENGLISH_FRAMES).format_map(_english_words(story)), True
    wrong = (_answer(story, lines[::-1], language),)
    return Exercise("stories", language, prompt, polite, _answer(story, lines, language), wrong)


def _prose(rng: Random, split: Split, language: Language, parallel: bool) -> str:
    """A story; in parallel texts in both languages."""
    story = rng.choice(stories(split))
    lines = _lines(rng, story)
    told = _told(story, lines, language)
    return f"{told}\n\n{_told(story, lines, 'en' if language == 'ko' else 'ko')}" if parallel else told


STORIES = Task("stories", _exercise, _prose)
