"""Why a row is dropped, or what is noted of a kept one: what each reason means, and what can be done about it.

`REASONS` is the table. `reason_of` finds a reason in it, also one that names a field (`missing_answer`, `input_is_not_text`).
"""

from typing import NamedTuple


class Reason(NamedTuple):
    """One reason of the table of sources."""

    meaning: str
    remedy: str = ""
    """What a recipe can change; empty where only other rows help."""


_SPELLING = "name the field in the adapter's option; the table lists fields that are not read"
_FETCH = "fetch or convert the file again"
REASONS: dict[str, Reason] = {
    # readers
    "malformed_row": Reason(
        "the row is not of its format, or not of the adapter's shape", "see what was found, and the adapter's example"
    ),
    "malformed_file": Reason("the file is not of its format", f"give format, or {_FETCH}"),
    "row_too_long": Reason("the row, cell or paragraph is longer than any text", "check what divides rows and cells"),
    "ragged_row": Reason(
        "the row has more or fewer cells than the header", "quote cells that hold the delimiter, or options delimiter, quote"
    ),
    "unclosed_quote": Reason(
        "a quotation mark opens in the line that is named and never closes, or closes far below; each line that it holds counts",
        "mend that line; options: {quote: none} where marks are ordinary characters",
    ),
    "repeated_header": Reason("the line is the table's header once more, as where tables were put together"),
    "repeated_key": Reason("an object has two values under one name, and a row could keep only one", "mend the rows"),
    "no_rows": Reason(
        "a file of an archive, or one of many, holds nothing that is read", "option suffixes, or a glob, names those to read"
    ),
    "no_gutenberg_markers": Reason("the text has no Project Gutenberg markers", "leave out the option gutenberg"),
    # fields
    "wrong_schema": Reason(
        "the row is of another set than the adapter's", "use the adapter that is named, or the one of the row's shape"
    ),
    "undeclared_value": Reason(
        "a field that carries meaning has a value of no declared meaning; the source is refused", "see the message"
    ),
    "missing_FIELD": Reason("the row has no such field", _SPELLING),
    "FIELD_is_not_text": Reason("the field holds something other than text or a number", "name the text inside it: answers.0.text"),
    "FIELD_is_no_list_of_pairs": Reason("the field is not a list of questions with their answers", "mend the rows"),
    "missing_messages": Reason(
        "the row has no list of turns", "name it in the option field, or ask keural data try FILE for the adapter of such rows"
    ),
    "missing_dialogue": Reason("the row has no list of turns", "name it in the option field"),
    "missing_label": Reason(
        "the row does not say whether its answer is good, or which of two is the better",
        "name the field in the option label, or fields with numbers in the option scores",
    ),
    "missing_prompt": Reason("the row has no prompt, neither by itself nor inside its answers", "name it in the option prompt"),
    "missing_speaker": Reason("an utterance does not say who speaks"),
    "missing_system": Reason("the row lacks the system turn that makes one answer the better"),
    "missing_score": Reason("the row lacks one of two scores", "name the fields in the option scores, or in ignore"),
    "missing_ranking": Reason("fewer than two answers have a score or rank", "name the field in the option scores"),
    "fields_differ": Reason(
        "two fields say different things of one matter", "name one in its option, or the other in the option ignore"
    ),
    "system_differs": Reason(
        "the field beside the turns is another system text than the first turn", "name one of them in option ignore"
    ),
    "prompt_differs": Reason("the prompt beside the turns is not the first question"),
    "empty": Reason("the text is empty or white space"),
    "empty_turn": Reason("a turn is empty or white space"),
    "empty_list": Reason("a list that option unfold names holds nothing"),
    "empty_question": Reason("an evaluation item has no question"),
    "invalid_unicode": Reason(
        "the text holds bytes that are no characters; the first are named", "options: {encoding: cp949}, or fetch the file again"
    ),
    "null_text": Reason("the text is the word of an export for nothing"),
    # turns
    "unknown_role": Reason("a turn is of a role that is not known", "say what it is in the option roles: {name: user}"),
    "not_alternating": Reason(
        "turns do not alternate between user and assistant", "options: {consecutive: merge} joins turns of one side"
    ),
    "assistant_first": Reason(
        "the assistant speaks first", "options: {assistant_first: keep} keeps what it says, cut leaves it out"
    ),
    "system_inside": Reason(
        "a system turn stands after others",
        "options: {system_inside: merge} joins it to the user's turn, keep leaves it where it is",
    ),
    "no_assistant_turn": Reason("no turn is an answer", "check the roles"),
    "more_than_two_speakers": Reason("more than two people speak"),
    "content_not_text": Reason("a turn holds parts that are no text: images, sound, files"),
    "malformed_tools": Reason("the tool definitions are no list of objects with a name", "name another field in the option tools"),
    "malformed_tool_call": Reason("a call of a tool has no name, or its arguments are no JSON object"),
    "tool_result_without_call": Reason("a tool's result follows no call, or has another call's id"),
    "tool_results_out_of_order": Reason("results of several calls stand in another order than the calls"),
    "reasoning_is_not_text": Reason("the reasoning of an answer is no text", "name its field in the option ignore"),
    "reasoning_outside_answer": Reason("a turn that is no answer holds reasoning"),
    "has_reasoning": Reason(
        "a judged answer holds reasoning, which pairs and labelled answers do not train",
        "options: {ignore: [reasoning_content]} leaves it out",
    ),
    "prompt_does_not_end_with_user": Reason("the prompt ends with an answer, or is empty"),
    "completion_does_not_begin_with_assistant": Reason("the completion does not begin with an answer"),
    "unanswerable": Reason("the question has no answer, as the set says"),
    "text_before_first_turn": Reason("a transcript does not begin with a turn"),
    "role_marker_in_turn": Reason("a turn of a transcript holds the name of a role: two turns ran together"),
    "ends_with_user": Reason("the last turn is the user's, so there is no answer"),
    # what is trained
    "label_false": Reason("the row says that its answer is not a good one"),
    "label_of_several_turns": Reason("the row's label is of a completion of several turns, of which only one can be judged"),
    "not_trained": Reason("the row says that it is not to be trained"),
    "nothing_trained": Reason("no turn of the row is to be trained"),
    "other_channel": Reason(
        "an answer is not for the user, as its field channel says: it is analysis or commentary",
        "name channel in the option ignore",
    ),
    "trained_spans": Reason(
        "a turn says which characters or parts of it are trained, which is not read",
        "name train_detail, or the field of its parts, in the option ignore",
    ),
    # pairs
    "no_preference": Reason("the label says that nobody preferred an answer", "option labels says which values mean it"),
    "label_tie": Reason("the label says that neither answer is the better", "option labels says which values mean it"),
    "chosen_equals_rejected": Reason("both answers are the same"),
    "history_differs": Reason("the answers follow different turns, or others than the prompt beside them"),
    "score_tie": Reason("both answers are of equal worth"),
    "score_reversed": Reason(
        "the scores prefer the rejected answer",
        "options: {scores: [..], lower_is_better: true}, or {ignore: [..]} where they are no scores of it",
    ),
    "small_margin": Reason("the scores differ by less than the option min_margin"),
    "several_answers": Reason(
        "chosen or rejected holds several answers", "options: {pairs: all} takes each chosen one with each rejected one"
    ),
    "not_two_answers": Reason("a label says which of two answers is the better, and the row has another number of them"),
    "answer_equals_question": Reason("an answer repeats the question"),
    "in_gsm8k_train": Reason("the question is of the GSM8K training set"),
    # corpora
    "other_part": Reason("the row is of another part of its set"),
    "other_language": Reason("the document is in another language"),
    "other_license": Reason("the document is of a licence that is not wanted", "option licenses"),
    "no_license": Reason("the document states no licence"),
    "low_language_score": Reason("the language is uncertain", "option min_language_score"),
    "redirect": Reason("the article only points to another"),
    "stub": Reason("the article is a beginning of one"),
    "long_lines": Reason("the lines are too long for code that people write"),
    "few_letters": Reason("the file is mostly not letters"),
    "mostly_formulas": Reason("the paper is mostly placeholders of formulas"),
    # gates
    "placeholder": Reason(
        "something was taken out of a turn, or never filled in: a picture, a name, a variable of a template",
        "gates: {placeholders: count}",
    ),
    "empty_answer": Reason(
        "an answer is only none, N/A or 없음, which the question does not name: a label, or the lack of an answer",
        "gates: {empty_answers: drop}, or skip",
    ),
    "blank": Reason("a turn has something to fill in: [Your Name], [회사명]", "gates: {blanks: drop}, or skip"),
    "masked_name": Reason("a turn has signs for a name or number: 김○○, 010-XXXX-XXXX", "gates: {masked_names: drop}, or skip"),
    "self_identification": Reason("an answer says that it is another model", "gates: {self_identification: skip}"),
    "refusal": Reason("the better answer refuses", "gates: {refusals: skip}"),
    "control_string": Reason("a turn spells a marker of some chat format", "gates: {control_strings: skip}"),
    "personal_data": Reason("a turn holds a resident number, telephone number or e-mail address", "gates: {personal_data: skip}"),
    "not_korean": Reason(
        "the prose of a side of the record is not Korean", "gates: {language: skip}, or mend the source's language"
    ),
    "not_english": Reason(
        "the prose of a side of the record is not in Latin letters", "gates: {language: skip}, or mend the source's language"
    ),
    "disguised_letters": Reason(
        "words hold letters of another script that look like Latin ones", "gates: {language: skip}, for conversations and pairs"
    ),
    "answer_too_short": Reason("an answer is shorter than min_characters", "min_characters"),
    "turn_too_long": Reason("a turn is longer than max_characters", "max_characters"),
    "length_ratio": Reason("one answer is much longer than the other", "max_length_ratio"),
    "contaminated": Reason("the record holds an evaluation item", "gates: {contaminated: count}"),
    # length and repetition
    "too_short": Reason("the document is shorter than min_characters", "data.min_characters"),
    "too_long": Reason("no beginning with a trained answer fits", "data.sequence_length"),
    "prompt_too_long": Reason("the prompt leaves no room for an answer", "data.sequence_length"),
    "answer_too_long": Reason("a side of the pair, or the labelled answer, does not fit", "data.sequence_length"),
    "duplicate": Reason("the same record was there before"),
    "duplicate_after_cut": Reason("without the turns after its last answer, which are cut, the same record was there before"),
    "duplicate_id": Reason("a record with the same id was there before", "id_space"),
    "duplicate_prompt": Reason("another record asks the same", "gates: {duplicate_prompts: skip}"),
    "swapped_pair": Reason("the same pair was there with its answers swapped"),
    "other_label": Reason("the same answer to the same prompt was there with the other label"),
    "held_out": Reason("a held-out source asks the same"),
    "over_limit": Reason("the limit was reached before", "limit"),
    # notes of kept records
    "unanswered_turns_cut": Reason("turns after the last answer are left out"),
    "greeting_left_out": Reason("what the assistant says before the user spoke is left out", "option assistant_first"),
    "reasoning_left_out": Reason("the reasoning of an answer is left out", "options: {reasoning: train} or keep"),
    "input_left_out": Reason(
        "an input that is only none, N/A or 없음 is taken for no input", "adapter qa with question: [instruction, input] keeps it"
    ),
    "other_items_left_out": Reason("a field takes one item of a list that has more", "option unfold makes a record of each"),
    "history_not_trained": Reason("a turn before the answers of a pair is to be trained, as the row says; pairs train answers"),
    "unranked_answer_left_out": Reason("an answer without a score or rank is in no pair"),
    "question_trained": Reason("a turn that is no answer is trained, as the row says", "name the field in the option ignore"),
}
PATTERNS = {
    "missing_": "missing_FIELD",
    "_is_not_text": "FIELD_is_not_text",
    "_is_no_list_of_pairs": "FIELD_is_no_list_of_pairs",
}
"""Reasons that name a field, by the part of them that is always there."""


def reason_of(name: str) -> Reason | None:
    """What a reason means; None for one that is not in the table, such as those of a corpus' filters."""
    if name in REASONS:
        return REASONS[name]
    found = (known for part, known in PATTERNS.items() if (name.startswith if part.endswith("_") else name.endswith)(part))
    return next((REASONS[known] for known in found), None)
