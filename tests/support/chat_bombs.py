"""Chat templates that ask for gigabytes or never end, and a program that renders them all.

Each line is one of them, as an expression or as statements. They can use a huge number `n` (also as
`messages[0].size`, which is no constant), a text `s` of 1 MiB, and a list `l` of 2 GiB in which it
is repeated. `d` and `e` are lists of two lists, and so on 60 times: as texts they have 2⁶⁰ copies
of `s`. `t` is a tuple of this kind.
"""

import importlib
import json
import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from q4jit import GGUFError
from tests.support.paths import ROOT

MAX_BYTES = 96 << 20  # less than in the demo, so that it is reached sooner
NO_TOKENS = SimpleNamespace(special_tokens={})
BEFORE = (
    "{% set n = 10**10 %}{% set s = 'ab' * 2**19 %}{% set l = [s] * 2**11 %}"
    "{% set ns = namespace(d=[s], e=[s], t=(s,), y='ab') %}{% for i in range(60) %}"
    "{% set ns.d = [ns.d, ns.d] %}{% set ns.e = [ns.e, ns.e] %}{% set ns.t = (ns.t, ns.t) %}"
    "{% endfor %}{% set d = ns.d %}{% set e = ns.e %}{% set t = ns.t %}"
)

OPERATORS = r"""
'a' * 10**10
10**10 * 'a'
'a' * messages[0].size
'a'.encode() * n
[1] * n
(1, 2) * n
messages * n
s * 2**10
s * 2**5 * 2**5
'' ~ [0] * n
10 ** (10**10)
2 ** n
n ** n
'%10000000000d' % 1
'%(a)-10000000000d' % {'a': 1}
'%.2147483640f' % 1.5
'%*d' % (n, 1)
('%' ~ n ~ 'd') % 1
'%10000000000d'.encode() % 1
'%.*d'.encode() % (2**31 - 9, 1)
('%s' * 2**10) % ((s,) * 2**10)
('%s' * 2**10).encode() % ((s.encode(),) * 2**10)
'%s' % d
'%r' % (d,)
d ~ ''
s ~ l
l ~ l
d == e
{t: 1}
""".strip().splitlines()

FILTERS = r"""
'x' | center(n)
'x' | indent(n, true)
(s | replace('a', '\n')) | indent(s)
(s | replace('a', '\n')) | indent(2**12)
['x'] | batch(n, 'x') | list
[1] | slice(n) | list
2.5 | round(n, 'ceil')
[1] | tojson(indent=n)
[[1] * 2**20] | tojson(indent=2**12)
[[1] * 2**20] | tojson(indent=s)
{'a': [1] * 2**20} | tojson(separators=(s, s))
d | tojson
l | tojson
d | pprint
d | string
d | e
d | forceescape
d | urlencode
d | upper
d | trim
d | first | string
{'a': d} | xmlattr
{'a': s * 9, 'b': l} | xmlattr
l | join
l | join('-')
(range(2**16) | list) | join(s)
(range(2**16) | list) | map('string') | join(s)
s | list | join(s)
l | map('upper') | list
l | map('replace', 'a', 'abc') | list
l | map('center', 2**24) | list
l | map('batch', n) | map('list') | list
[n] | map('center', n) | list
l | map('list') | list
s | replace('a', s)
s | replace('', s)
s | wordwrap(1, wrapstring=s)
'%10000000000d' | format(1)
'%*d' | format(n, 1)
('%s' * 2**10) | format(*l)
'%s' | format(d)
('http://a.bc ' * 2**16) | urlize(rel=s)
('http://a.bc ' * 2**16) | urlize(target=s)
('http://a.bc ' * 2**16) | urlize(2, false, s, s)
[{'a': l * 2**10}, {'a': l * 2**10}] | sum(attribute='a', start=[])
(s * 2**6) | title
(s * 2**6) | capitalize
(s * 2**6) | reverse
(s * 2**6) | lower
(s * 2**6) | list | sort
(s * 2**6) | urlencode
('<' * 2**26) | e
[d, e] | sort
[d] | min | string
{'a': d} | dictsort | string
{'a': d} | items | list | string
[[d]] | map(attribute=0) | list | string
l | select | list | join
l | reject('none') | list | join
[{'a': l}] | selectattr('a') | list | string
[{'a': l}] | rejectattr('b') | list | string
d | default(1) | string
d | last | string
d | random | string
d | striptags
d | truncate(n)
d | wordcount
d | capitalize
d | title
d | lower
d | replace('a', 'b')
d | batch(1) | list | string
d | slice(1) | list | string
d | list | string
d | reverse | list | string
d | format
d | sum(start=[]) | string
d | urlize
[d] | groupby(0) | string
(d | attr('copy'))() | string
s | truncate(2**30, true, s) | center(n)
""".strip().splitlines()

METHODS = r"""
'x'.center(n)
'x'.center(messages[0].size)
'x'.ljust(n)
'x'.zfill(n)
'\t'.expandtabs(2**31 - 9)
s.replace('a', '\t').expandtabs(2**12)
s.replace('a', s)
s.replace('', s)
s.join(l)
''.join(l)
s.join(s)
s.translate({97: s})
s.split('a') | join(s)
s.rsplit('a') | join(s)
(s * 2**6).encode('utf-32').hex('-').encode('utf-32')
(s * 2**9).casefold()
(s * 2**8).swapcase().splitlines() * n
(s * 2**8).partition('b') * 2**28
s.maketrans('a', 'b') ~ [0] * n
'{:10000000000}'.format(1)
'{:{w}}'.format(1, w=n)
'{:{}}'.format('x', messages[0].size)
'{:.2147483640f}'.format(1.5)
'{w:>{w}}'.format_map({'w': n})
('{0}' * 2**10).format(s)
'{}'.format(d)
'{0!r}'.format(d)
'{a[0]}'.format(a=d)
('%s' | safe).format(d) ~ ('{}' | safe).format(d)
'x'.encode().center(n)
'x'.encode().ljust(n)
'x'.encode().zfill(n)
'\t'.encode().expandtabs(2**31 - 9)
s.encode().replace('a'.encode(), s.encode())
s.encode().join([s.encode()] * 2**10)
s.encode().translate(none) * n
(1).to_bytes(n, 'big')
(1).from_bytes((s * 2**9).encode(), 'big')
(0.1).as_integer_ratio() * n
[1].copy() * n
{'a': l}.values() | list | string
{'a': d}.items() | list | string
dict.fromkeys(range(2**16), d) | string
""".strip().splitlines()

FUNCTIONS = r"""
range(n)
lipsum(n=2**30, html=false)
cycler(*l).current ~ l | join
joiner(d)() ~ joiner(d).sep
namespace(a=d).a | string
strftime_now('%c' * 2**28)
raise_exception('a' * n)
raise_exception(l | join)
""".strip().splitlines()

STATEMENTS = r"""
{% for i in range(60) %}{% set ns.y = ns.y ~ ns.y %}{% endfor %}
{% for i in range(60) %}{% set ns.y = ns.y + ns.y %}{% endfor %}
{% for i in range(60) %}{% set ns.y = [ns.y, ns.y] | join %}{% endfor %}
{% for i in range(60) %}{% set ns.y = '%s%s' % (ns.y, ns.y) %}{% endfor %}
{% for i in range(60) %}{% set ns.y = '{0}{0}'.format(ns.y) %}{% endfor %}
{% for i in range(60) %}{% set ns.y = ns.y | replace('a', 'aba') %}{% endfor %}
{% for i in range(60) %}{% set ns.y = ns.y | list + ns.y | list %}{% endfor %}
{% for i in range(60) %}{% set y %}{{ ns.y }}{{ ns.y }}{% endset %}{% set ns.y = y %}{% endfor %}
{% macro f(y) %}{{ y ~ y }}{% endmacro %}{% for i in 'a' * 60 %}{% set ns.y = f(ns.y) %}{% endfor %}
{% macro f(i) %}{% if i %}{{ f(i - 1) }}{{ f(i - 1) }}{% endif %}{% endmacro %}{{ f(60) }}
{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}{% call f() %}{{ l }}{% endcall %}
{% set ns.z = 3 %}{% for i in range(60) %}{% set ns.z = ns.z ** 9 %}{% endfor %}
{% filter center(n) %}x{% endfilter %}
{% filter replace('', s) %}{{ s }}{% endfilter %}
{% generation %}{{ l }}{% endgeneration %}
{% generation %}{% filter center(n) %}x{% endfilter %}{% endgeneration %}
{% set x = l | join %}{{ x }}
{% set x | center(n) %}x{% endset %}
{% if l | join == '' %}x{% endif %}
{% if d is eq(e) %}x{% endif %}
{% if s in l | join %}x{% endif %}
{% for x in 'a' * n %}{% break %}{% endfor %}
{% for x in s * 2**12 %}{% continue %}{% endfor %}
{% for x in [l, l] recursive %}{{ loop(x) if x is not string else x }}{% endfor %}
{% for x in l %}{{ x }}{% endfor %}
{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{% for a in s * 2**12 if a == 'c' %}{% endfor %}
{{ l }}
{{ d }}
{{ [l] * 2**9 }}
{{ {'a': l} }}
{{ messages * 2**28 }}
{{ (s * 2**9)[::2] ~ (s * 2**9)[1:] }}
{{ l[:] ~ d[:1] }}
""".strip().splitlines()


def templates() -> list[str]:
    """Return every bomb as a template."""
    expressions = [*OPERATORS, *FILTERS, *METHODS, *FUNCTIONS]
    bombs = [f"{{{{ {line} }}}}" for line in expressions] + STATEMENTS
    return [BEFORE + bomb for bomb in bombs]


def main() -> None:
    """Render every bomb; print what became of it, and the peaks of memory in bytes, as JSON."""
    sys.path.insert(0, str(ROOT / "examples"))
    tokenizer = importlib.import_module("tokenizer")
    vars(tokenizer).update(MAX_CHAT_SECONDS=1, MAX_CHAT_BYTES=MAX_BYTES)

    def outcome(template: str) -> str:
        try:
            text = tokenizer.render_chat(template, [{"size": 10**10}], NO_TOKENS)
        except GGUFError as error:
            return f"GGUFError: {error}"
        return f"a text of {len(text)} characters"

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        outcomes = list(threads.map(outcome, templates()))
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    json.dump({"outcomes": outcomes, "peaks": [_own_peak(), of_children]}, sys.stdout)


def _own_peak() -> int:
    """Return this process's peak of memory in bytes; ru_maxrss has that of its parent, too."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kib = next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]
    return int(kib) << 10


if __name__ == "__main__":
    main()
