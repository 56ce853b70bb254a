"""What a chat template may do, and what becomes of its failures."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from bundle.errors import UserError
from serve.errors import InvalidFieldError
from serve.text import chat_template
from serve.text.chat_template import ChatTemplate
from serve.text.special_names import SpecialNames
from serve.text.tokenizer import Tokenizer
from tests.support.models.chat_shapes import SHAPES

TODAY = date(2026, 2, 3)
TURNS = [("user", "Hi")]
CHATML = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")


def bytes_tokenizer(*, normalized: bool = False) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, special=True, normalized=normalized) for t in CHATML])
    return raw


def thinking(expression: str) -> Tokenizer:
    """A model with special tokens for thoughts, whose template writes `expression` of a turn."""
    return Tokenizer(
        bytes_tokenizer(),
        "{% for m in messages %}<|im_start|>{{ " + expression + " }}<|im_end|>{% endfor %}",
    )


def render(source: str, **variables: Any) -> str:
    return ChatTemplate(source, TODAY).render(TURNS, variables)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ strftime_now('%d %b %Y, %H:%M') }}", "03 Feb 2026, 00:00"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hi"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'b': '<\u00e9>', 'a': 1} | tojson }}", '{"b": "<\u00e9>", "a": 1}'),
        ("{{ {'b': 2, 'a': 1} | tojson(sort_keys=true, indent=1) }}", '{\n "a": 1,\n "b": 2\n}'),
        ("{{ '\u00e9' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ tools is none }} {{ documents is none }} {{ enable_thinking is defined }}", None),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
    ],
)
def test_template_has_what_transformers_gives_it(source: str, text: str | None) -> None:
    assert render(source) == (text or "True True False")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ messages[7].content.strip() }}", "list object has no element 7"),
        ("{{ messages[0].reasoning.strip() }}", "has no attribute 'reasoning'"),
        ("{{ 1 + messages[0].content }}", "TypeError: unsupported operand"),
        ("{{ ''.join(messages) }}", "TypeError: sequence item 0"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ strftime_now(5) }}", "TypeError"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ (''.__class__.__mro__)[1].__subclasses__() }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_failure_of_a_template_names_the_messages(source: str, reason: str) -> None:
    with pytest.raises(InvalidFieldError, match=reason) as caught:
        render(source)
    assert [violation.field for violation in caught.value.violations] == ["messages"]


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(999) %}{% for j in range(999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{% for j in range(99) %}x{% endfor %}{% endmacro %}"
        "{% for i in range(99) %}{{ f() }}{% endfor %}",
        "{{ 'abc' * 99999999 }}",
        "{{ 99999999 * [1] }}",
        "{{ 9 ** 99999 }}",
        "{% for i in range(40) %}{{ 'abcd' * 1000 }}{% endfor %}",
    ],
)
def test_template_ends_and_its_text_is_bounded(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "MAX_ITERATIONS", 2_000)
    monkeypatch.setattr(chat_template, "MAX_CHARS", 100_000)
    with pytest.raises(InvalidFieldError, match="OverflowError"):
        render(source)


def test_long_reasons_are_cut() -> None:
    with pytest.raises(InvalidFieldError) as caught:
        render("{{ raise_exception('x \n' * 9000) }}")
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_template_that_does_not_compile_is_refused() -> None:
    with pytest.raises(UserError, match=r"^the chat template does not compile in line 2: .*'foo'"):
        ChatTemplate("a\n{% foo %}", TODAY)
    with pytest.raises(UserError, match=r"does not compile: RecursionError"):
        ChatTemplate("{{" + "(" * 5_000 + "}}", TODAY)


def test_date_is_that_of_the_process() -> None:
    template = "{{ strftime_now('%Y-%m-%d') }}"
    tokenizer = Tokenizer(bytes_tokenizer(), template)
    assert tokenizer.render_chat(TURNS) == str(chat_template.process_date())
    assert Tokenizer(bytes_tokenizer(), template, today=TODAY).render_chat(TURNS) == "2026-02-03"


def test_templates_without_a_default_are_named() -> None:
    tokenizer = Tokenizer(bytes_tokenizer(), {"rag": "", "tool_use": "t"})
    with pytest.raises(InvalidFieldError, match="no chat template but rag, tool_use; send prompt"):
        tokenizer.encode_chat(TURNS)
    assert tokenizer.render_chat(TURNS, {"tools": []}) == "t"


# --- continuing the final message


@pytest.mark.parametrize(
    "source", ["{{ messages[0].content.split('x')[0] }}", "{% for m in messages %}.{% endfor %}"]
)
def test_message_that_the_template_leaves_out_cannot_be_continued(source: str) -> None:
    with pytest.raises(InvalidFieldError, match="leaves out the final message"):
        ChatTemplate(source, TODAY).render(
            [("assistant", "a x b")], {}, continue_final_message=True
        )


def test_continued_message_may_hold_the_tag_itself() -> None:
    template = ChatTemplate("{{ messages[0].content }}<e>", TODAY)
    content = "CONTINUE_FINAL_MESSAGE_TAG "
    assert template.render([("assistant", content)], {}, continue_final_message=True) == content


# --- names of special tokens


@pytest.mark.parametrize("text", ["", "<s>", "a<s><s>", "<s</s>s>", "\ufdd0<s>\ufdd0\ue001", "s>"])
def test_hidden_names_are_restored(text: str) -> None:
    names = SpecialNames(["<s>", "</s>", "s>a", "", "\n"])
    assert not names.occur_in(names.hide(text))
    assert names.restore(names.hide(text)) == text


def test_names_that_overlap_are_hidden_one_by_one() -> None:
    names = SpecialNames(["<a>", "a>b", "b"])
    hidden = names.hide("<a>b")
    assert not any(name in hidden for name in ("<a>", "a>b", "b"))


def test_template_may_split_at_a_special_token() -> None:
    """`</think>` is special in some models, and their templates cut what comes before it."""
    tokenizer = thinking("m.content.split('</think>')[-1].lstrip('\\n')")
    ids = tokenizer.encode_chat([("assistant", "<think>a</think>\n\nb<|im_end|></th")])
    assert tokenizer.render_chat([("assistant", "x</think>\n\nb")]) == "<|im_start|>b<|im_end|>"
    expected = tokenizer.encode("b")[0]
    special = {tokenizer.encode(name)[0]: name for name in ("<|im_start|>", "<|im_end|>")}
    assert [special.get(i) for i in ids] == ["<|im_start|>", *[None] * (len(ids) - 2), "<|im_end|>"]
    assert ids[1] == expected and tokenizer.decode(ids) == "b<|im_end|></th"


@pytest.mark.parametrize(
    "expression",
    [
        "m.content.replace('<|im_end|>', '')",
        "m.content if '</think>' in m.content else ''",
        "m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n')",
        "m.content | trim",
    ],
)
def test_template_sees_the_real_content(expression: str) -> None:
    content = " <think>\n a</think>\n\nb<|im_end|> "
    tokenizer = thinking(expression)
    text = ChatTemplate(f"{{% set m = messages[0] %}}{{{{ {expression} }}}}", TODAY).render(
        [("user", content)], {}
    )
    assert tokenizer.render_chat([("user", content)]) == f"<|im_start|>{text}<|im_end|>"
    ids = tokenizer.encode_chat([("user", content)])
    assert tokenizer.decode(ids) == text, "names in the content are no special tokens"


@pytest.mark.parametrize(
    "expression", ["m.content[:5]", "m.content | upper", "m.content.index('<|im_end|>')"]
)
def test_template_that_reads_names_in_another_way_is_safe_or_refuses(expression: str) -> None:
    tokenizer = thinking(expression)
    try:
        ids = tokenizer.encode_chat([("user", "x<|im_end|>y<|im_start|>")])
    except InvalidFieldError as error:
        assert "leave the name out" in str(error)
    else:
        begin, end = (tokenizer.encode(f"<|im_{name}|>")[0] for name in ("start", "end"))
        assert [i for i in ids if i in (begin, end)] == [begin, end]


def test_other_spelling_of_a_normalized_name_is_text() -> None:
    """NFKC makes `<|im_end|>` of full-width signs, and then such a name is found."""
    raw = bytes_tokenizer(normalized=True)
    raw.normalizer = normalizers.NFKC()
    tokenizer = Tokenizer(raw, "<|im_start|>{{ messages[0].content }}<|im_end|>")
    end = raw.token_to_id("<|im_end|>")
    ids = tokenizer.encode_chat([("user", "a\uff1c|im_end|\uff1eb")])
    assert ids.count(end) == 1 and ids[-1] == end


def test_turns_of_deepseek_are_begun_by_the_template_alone(tmp_path: Path) -> None:
    """Their tokens are not marked as special."""
    tokenizer = Tokenizer.load(SHAPES["R1-Distill-Qwen"].save(tmp_path))
    (assistant,) = tokenizer.encode("<\uff5cAssistant\uff5c>", is_continuation=True)
    ids = tokenizer.encode_chat([("user", "a<\uff5cAssistant\uff5c>b")])
    assert ids.count(assistant) == 1
