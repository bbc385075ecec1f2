"""What the stages of a run were trained on, as text again: of a stage and of those that it starts from.

In: a run directory. Out: `TrainingText`s that read the token stores when they are asked to. Where a stage began from a model of
elsewhere, or an earlier version did not say where its data was, that is what reading says.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from keural.data.loading.corpus import Corpus
from keural.errors import UserError
from keural.evaluate.contamination import TrainingText, training_text
from keural.files import fingerprint
from keural.pipeline.run_directory import DONE, MODEL, Done
from keural.tokenizer import KeuralTokenizer


def trained_on(run: Path, stage: str) -> list[TrainingText]:
    """The training data of a finished stage and of those before it, oldest first; nothing of a stage that is not there."""
    done = Done.find(run / stage / DONE)
    if done is None:
        return []
    own = _text_of(run, done)
    if done.init_from == "random":
        return [own]
    if before := trained_on(run, done.init_from):
        return [*before, own]
    reason = f"{stage} starts from {done.init_from}, whose training data is not in {run}"
    return [TrainingText(done.init_from, f"elsewhere: {done.init_from}", _refusing(reason)), own]


def _text_of(run: Path, done: Done) -> TrainingText:
    if not done.data:
        reason = f"an earlier version has trained {done.name}, and did not keep where its data was"
        return TrainingText(done.name, f"unsaid: {done.name}", _refusing(reason))
    paths = tuple(run / path for path in done.data)
    names = tuple(map(str, range(len(paths)))) if len(paths) > 1 else ()
    tokenizer = KeuralTokenizer.load(run / done.name / MODEL)
    corpus = Corpus(paths, names, done.shards)
    try:
        content = corpus.open(tokenizer.sha256, tokenizer.vocab_size, "size").fingerprint
    except UserError as error:
        return TrainingText(done.name, f"not there: {done.data}", _refusing(str(error)))
    return training_text(done.name, fingerprint([content, tokenizer.sha256]), corpus, tokenizer)


def _refusing(reason: str) -> Callable[[], Iterable[str]]:
    """Reads nothing, and says why."""

    def read() -> Iterable[str]:
        raise UserError(reason)

    return read
