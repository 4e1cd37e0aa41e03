"""The demo's chat templates: the text that transformers writes, within limits."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q4jit import GGUFError
from tests.support import chat_bombs
from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from tokenizer import GGUFTokenizer, render_chat

METADATA: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ("<s>", "</s>", "<pad>", "a"),
    "tokenizer.ggml.token_type": np.array([3, 3, 3, 1]),
    "tokenizer.ggml.merges": (),
    "tokenizer.ggml.eos_token_id": 1,
}
MESSAGES = [{"role": "user", "content": "What is <b> & 'é'?"}, {"role": "tool", "content": ""}]


def render(template: str, messages: Any = MESSAGES, **keys: int) -> str:
    special = {f"tokenizer.ggml.{name}_token_id": token for name, token in keys.items()}
    return render_chat(template, messages, GGUFTokenizer(METADATA | special))


# Template and text; transformers 5.24 wrote the same texts.
AS_IN_TRANSFORMERS = [
    ("{{ messages | tojson }}", json.dumps(MESSAGES, ensure_ascii=False)),
    ("{{ {'z': '<&>', 'a': \"'\"} | tojson }}", '{"z": "<&>", "a": "\'"}'),
    ("{{ {'z': [1, none]} | tojson(indent=2) }}", '{\n  "z": [\n    1,\n    null\n  ]\n}'),
    ("{{ {'é': 1} | tojson(ensure_ascii=true) }}", '{"\\u00e9": 1}'),
    ("{{ {'é': 1, 'a': 2} | tojson(sort_keys=true) }}", '{"a": 2, "é": 1}'),
    ("{{ [1, {'a': 2}] | tojson(separators=(',', ':')) }}", '[1,{"a":2}]'),
    ("{{ tools == none }} {{ tools is defined }} {{ tools is not none }}", "True True False"),
    ("{{ documents == none }} {{ documents | length if documents else 0 }}", "True 0"),
    ("{{ add_generation_prompt is true }}", "True"),
    ("{{ enable_thinking is defined }} {{ date_string is undefined }}", "False True"),
    ("{{ bos_token is defined }} {{ eos_token }} {{ pad_token == none }}", "False </s> False"),
    ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
    (
        "{% for i in range(5) %}{% if i is odd %}{% continue %}{% endif %}{{ i }}{% endfor %}",
        "024",
    ),
    ("{{ strftime_now('%%') }}", "%"),
    ("a{% generation %}b{{ messages[0].role }}{% endgeneration %}c", "abuserc"),
    ("a {%- generation -%} b {%- endgeneration -%} c", "abc"),
    (
        "{% set x = 1 %}{% generation %}{% set x = x + 1 %}{{ x }}{% endgeneration %}{{ x }}",
        "21",
    ),
    (
        "{% macro m(x) %}<{{ x }}>{% endmacro %}{% generation %}{{ m(1) }}{% endgeneration %}",
        "<1>",
    ),
    (
        "{% for x in 'ab' %}{% generation %}{{ x, loop.index }}{% endgeneration %}{% endfor %}",
        "('a', 1)('b', 2)",
    ),
    ("{% if true %}\n  a\n  {% set x = 1 %}\nb\n  {{ x }}\n{% endif %}\n", "  a\nb\n  1\n"),
    ("a\r\nb\n", "a\nb"),
    ("{# a #}\n  {# b #}\nc", "c"),
    ("{{ '<' }}{{ '<' | e }}{{ messages[0].content }}", "<&lt;What is <b> & 'é'?"),
    (
        "{% set ns = namespace(a=1) %}{% for i in 'xy' %}{% set ns.a = i %}{% endfor %}{{ ns.a }}",
        "y",
    ),
    ("{{ messages[0].get('name', 'none') }} {{ messages[1:] | length }}", "none 1"),
    (
        "{{ '-' * 3 }} {{ 2 ** 10 }} {{ 2 ** 0.5 > 1 }} {{ '%5.1f%%' % 1.25 }}",
        "--- 1024 True   1.2%",
    ),
    (
        "{{ 'x' | center(3) }}{{ [1, 2] | batch(1) | list }} {{ 'a\nb' | indent(1) }}",
        " x [[1], [2]] a\n b",
    ),
]


@pytest.mark.parametrize(("template", "text"), AS_IN_TRANSFORMERS)
def test_a_template_renders_as_in_transformers(template: str, text: str) -> None:
    assert render(template) == text


def test_the_year_is_that_of_today() -> None:
    assert re.fullmatch(r"20\d\d", render("{{ strftime_now('%Y') }}"))


def test_special_tokens_of_the_file_have_their_names_in_transformers() -> None:
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    template = " ".join(f"{{{{ {name}_token }}}}" for name in names)
    keys = {"bos": 0, "unknown": 1, "seperator": 0, "padding": 2, "cls": 3, "mask": 1}
    assert render(template, **keys) == "<s> </s> </s> <s> <pad> a </s>"
    for missing in names:
        if missing != "eos":
            with pytest.raises(GGUFError, match=f"'{missing}_token' is undefined"):
                render(f"{{{{ {missing}_token + '' }}}}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self._TemplateReference__context }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ 'a' | attr('__class__') }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('only tools') }}",
        "{% if %}",
        "{% break %}",
        "{% generation %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ messages[0].content.missing.attribute }}",
        "{{ '\\ud800' }}",
    ],
)
def test_a_chat_template_cannot_leave_the_sandbox(template: str) -> None:
    with pytest.raises(GGUFError, match=r"^the chat template failed: \w+Error: .") as caught:
        render(template)
    assert "\n" not in str(caught.value)


def test_an_error_of_a_template_is_one_short_line() -> None:
    with pytest.raises(GGUFError) as caught:
        render("{{ raise_exception('only\n\\ttools\\x1b[2J' ~ 'a' * 10000) }}")
    message = str(caught.value)
    assert message.startswith("the chat template failed: TemplateError: only tools[2Jaaa")
    assert message.isprintable()
    assert len(message) < 400


def test_the_output_of_a_chat_template_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenizer.MAX_CHAT_CHARACTERS", 1000)
    assert len(render("{% for i in range(1000) %}x{% endfor %}")) == 1000
    with pytest.raises(GGUFError, match="over 1000 characters"):
        render("{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("{{ 'long text' | truncate(1) }}", "AssertionError"),
        ("{{ 'a' * 10**10 }}", "MemoryError: it needs over 256 MiB"),
        ("{{ 10 ** (10**10) }}", "it ran for over 1 s"),
    ],
)
def test_a_chat_template_that_exhausts_python_is_refused(
    template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenizer.MAX_CHAT_SECONDS", 1)
    with pytest.raises(GGUFError, match=f"the chat template failed: {message}"):
        render(template)


@pytest.mark.parametrize(
    ("program", "seconds", "message"),
    [
        ("import os; os.abort()", 2, "its process was ended by SIGABRT"),
        ("import time; time.sleep(60)", 0.1, "it ran for over 0.1 s"),
        ("raise MemoryError", 2, "MemoryError"),
    ],
)
def test_a_renderer_that_dies_is_an_error(
    program: str, seconds: float, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    child.write_text(program, encoding="utf-8")
    monkeypatch.setattr("tokenizer.CHAT_CHILD", child)
    monkeypatch.setattr("tokenizer.MAX_CHAT_SECONDS", seconds)
    with pytest.raises(GGUFError) as caught:
        render("a")
    assert str(caught.value) == f"the chat template failed: {message}"


@pytest.mark.process
def test_no_chat_template_takes_much_memory_or_time() -> None:
    templates = chat_bombs.templates()
    assert len(set(templates)) == len(templates) >= 118
    done = subprocess.run(
        [sys.executable, "-m", chat_bombs.__name__], cwd=ROOT, capture_output=True, check=True
    )
    report: Mapping[str, Any] = json.loads(done.stdout)
    limits = re.compile(
        "GGUFError: the chat template failed: (MemoryError|it ran for over|OverflowError: Range|"
        "TemplateError: it wrote over)"
    )
    assert [
        (template.removeprefix(chat_bombs.BEFORE), outcome)
        for template, outcome in zip(templates, report["outcomes"], strict=True)
        if not limits.match(outcome)
    ] == []
    assert max(report["peaks"]) <= chat_bombs.MAX_BYTES
