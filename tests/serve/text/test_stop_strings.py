import pytest
import tokenizers

from serve.text.stop_strings import CompletionText, StopChecker
from serve.text.tokenizer import Tokenizer


def released(tokenizer: Tokenizer, text: str, *stop: str) -> list[str]:
    """What each token of `text` releases, and what the end does."""
    completion = CompletionText(tokenizer, stop)
    return [completion.push([token]) for token in tokenizer.encode(text)] + [completion.finish()]


def test_characters_of_several_tokens_are_released_whole(tokenizer: Tokenizer) -> None:
    assert released(tokenizer, "a€b") == ["a", "", "", "€", "b", ""]
    assert released(tokenizer, "👋🏽")[3::4] == ["👋", "🏽"]


def test_unfinished_character_comes_with_the_end(tokenizer: Tokenizer) -> None:
    completion = CompletionText(tokenizer)
    assert completion.push(tokenizer.encode("a€")[:-1]) == "a"
    assert completion.finish() == "\ufffd"


def test_bytes_that_spoil_those_before_them_end_no_stream() -> None:
    vocab = {"<unk>": 0, "a": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    model = tokenizers.models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>")
    spoiled = tokenizers.Tokenizer(model)
    spoiled.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    completion = CompletionText(Tokenizer(spoiled))
    # A byte that is a character alone, and none in a run with one that is not.
    assert completion.push([2 + ord("x"), 2 + 0xFF, 1]) == "x\ufffda"


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    completion = CompletionText(tokenizer)
    assert completion.push([*tokenizer.encode("ab"), 2]) + completion.finish() == "ab"


def test_beginning_of_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    assert released(tokenizer, "a##b", "###") == ["a", "", "", "##b", ""]


def test_text_is_cut_before_the_stop_string(tokenizer: Tokenizer) -> None:
    assert released(tokenizer, "one###", "###") == ["o", "n", "e", "", "", "", ""]


def test_stop_string_inside_other_text_is_not_cut(tokenizer: Tokenizer) -> None:
    assert "".join(released(tokenizer, "a##b", "##")) == "a##b"


def test_earliest_of_several_stop_strings_cuts(tokenizer: Tokenizer) -> None:
    assert "".join(released(tokenizer, "xaab", "b", "aab")) == "x"


@pytest.mark.parametrize("text", ["", "plain", "ab€ß👋 x", "a#b##c", "###"])
def test_pieces_make_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    assert "".join(released(tokenizer, text, "####", "zz")) == text


def test_num_chars_counts_what_is_held_back(tokenizer: Tokenizer) -> None:
    completion = CompletionText(tokenizer, ["##"])
    completion.push(tokenizer.encode("ab#"))
    assert completion.num_chars == 3


def test_stop_check_is_true_where_the_stop_string_ends(tokenizer: Tokenizer) -> None:
    check = StopChecker(tokenizer, ["€x"])()
    ids = list(tokenizer.encode("a€xb"))
    assert [check(ids[:n]) for n in range(1, len(ids) + 1)] == [False] * 4 + [True, False]


def test_stop_check_ignores_what_ended_before_min_tokens(tokenizer: Tokenizer) -> None:
    check = StopChecker(tokenizer, ["#"])()
    assert not check(list(tokenizer.encode("a#b")))
    assert check(list(tokenizer.encode("a#b#")))


def test_stop_checks_of_one_request_are_independent(tokenizer: Tokenizer) -> None:
    make_check = StopChecker(tokenizer, ["ab"])
    first, second = make_check(), make_check()
    assert not first(list(tokenizer.encode("a")))
    assert not second(list(tokenizer.encode("b")))
