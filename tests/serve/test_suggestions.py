"""Things to ask: from a recipe into a model's record, and from there to a chat in the terminal and to the page."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from keural.errors import UserError
from keural.files import fingerprint, read_object, write_json
from keural.model import KeuralMoECausalLM
from keural.pretrained.directory import save_model_directory
from keural.pretrained.lineage import LINEAGE, suggestions_of
from keural.recipe import ChatSpec, load_recipe
from keural.recipe.shipped import SHIPPED
from keural.serve.chat import Conversation, converse
from keural.serve.engines.registry import suggestions
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.server.running import service_for
from keural.serve.server.settings import Settings
from keural.tokenizer import KeuralTokenizer
from tests.helpers.serving import Writing

ASKS = ["What is seven plus twelve?", "누구세요?", "<img src=x onerror=alert(1)>"]


def saved(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, out: Path, objectives: list[str], asks: list[str]) -> Path:
    return save_model_directory(
        out, model.config, model.state_dict(), tokenizer, {"objectives": objectives}, ChatSpec(suggestions=asks)
    )


class Keyboard:
    """A terminal on which nothing is typed."""

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive
        self.said: list[str] = []

    def read(self) -> str:
        raise EOFError

    def write(self, text: str) -> None:
        pass

    def notify(self, text: str) -> None:
        self.said.append(text)


def test_they_come_from_the_recipe_with_the_model_to_whoever_opens_it(
    model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, tmp_path: Path
) -> None:
    directory = saved(model, tokenizer, tmp_path / "m", ["next_token", "sft"], ASKS)

    assert suggestions_of(directory) == suggestions(directory) == ASKS
    service = service_for(Writing(tokenizer, "x"), tokenizer, directory, Settings(), SamplingParams())
    assert service.facts == {"suggestions": ASKS}


@pytest.mark.parametrize(("objectives", "asks"), [(["sft"], []), (["next_token"], ASKS), (["next_token", "next_token"], ASKS)])
def test_a_model_without_any_or_of_documents_alone_suggests_nothing(
    model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, tmp_path: Path, objectives: list[str], asks: list[str]
) -> None:
    directory = saved(model, tokenizer, tmp_path / "m", objectives, asks)

    assert suggestions_of(directory) == []
    assert "suggestions" not in read_object(directory / LINEAGE)["chat"]
    assert service_for(Writing(tokenizer, "x"), tokenizer, directory, Settings(), SamplingParams()).facts == {}


def test_a_terminal_shows_them_before_the_first_message_and_a_pipe_does_not() -> None:
    conversation: Any = Conversation(None, SamplingParams())  # type: ignore[arg-type]  # nothing is asked
    for interactive, asks, shown in ((True, ASKS, True), (True, [], False), (False, ASKS, False)):
        keyboard = Keyboard(interactive)
        converse(conversation, keyboard, asks)  # type: ignore[arg-type]
        assert any("누구세요?" in text for text in keyboard.said) is shown
        assert any("Ask" in text for text in keyboard.said) is shown


@pytest.mark.parametrize("odd", ["", " hello", "two\nlines", "\x1b[31mred", "turned \u202e round", "x" * 201, 7, None])
def test_what_does_not_show_as_it_is_is_refused_in_a_recipe_and_in_a_record(
    model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, tmp_path: Path, odd: Any
) -> None:
    with pytest.raises(ValidationError):
        ChatSpec(suggestions=[odd])
    directory = saved(model, tokenizer, tmp_path / "m", ["sft"], ASKS)
    record = {key: value for key, value in read_object(directory / LINEAGE).items() if key != "checksum"}
    record["chat"]["suggestions"] = [odd]
    write_json(directory / LINEAGE, record | {"checksum": fingerprint(record)})
    with pytest.raises(UserError, match=r"chat\.suggestions"):
        suggestions_of(directory)


def test_there_are_few() -> None:
    with pytest.raises(ValidationError):
        ChatSpec(suggestions=["What?"] * 7)


def test_the_toy_has_three() -> None:
    asks = load_recipe(SHIPPED / "toy").spec.chat.suggestions

    assert len(asks) == 3
    assert any(text.isascii() for text in asks)
    assert not all(text.isascii() for text in asks)
