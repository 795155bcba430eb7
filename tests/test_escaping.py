"""Names can hold anything: none of it acts in a terminal, a model card or a table."""

import csv
import io
import json
import logging
import subprocess
import sys
import unicodedata

import pytest

from timm_npu_irv2.cli.script import run_script, start_log
from timm_npu_irv2.cli.table import to_csv, to_json
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.escaping import csv_cell, markdown_code, markdown_fence, markdown_text, printable

EVIL = [
    '\x1b]0;title\x07', '\x1b[2J', '\x9b31m', 'a\u202egnp.exe', '\u2066x\u2069', 'two\nlines', 'over\rwritten', '\x00',
    '\u2028', '\U000e0041', '\ud800', 'tab\there', '\x7f', '\u200b',
]


@pytest.mark.parametrize('text', EVIL)
def test_nothing_in_a_terminal_acts(text):
    shown = printable(text)
    assert shown.isprintable() and not any(unicodedata.category(each) in ('Cc', 'Cf', 'Cs', 'Zl') for each in shown)


def test_letters_of_any_script_stay():
    text = 'Äpfel 金毛寻回犬 собака 🐕 café “quoted” \\n'
    assert printable(text) == text and text in to_json([text]).replace('\\"', '"').replace('\\\\', '\\')


def test_the_log_and_the_errors_of_scripts_are_printable(capsys):
    def fail(argv):
        start_log()
        logging.getLogger('x').warning('image \x1b[2J\n%s', 'forged line\x9b')
        raise UserError('no such file: \x1b]0;x\x07\nforged line')

    assert run_script('x.py', fail, []) == 2
    error = capsys.readouterr().err
    assert error.splitlines() == [
        r'image \x1b[2J\nforged line\x9b', r'x.py: error: no such file: \x1b]0;x\x07\nforged line']


@pytest.mark.parametrize('module', ['hub', 'weights'])
def test_the_errors_of_commands_are_printable(tmp_path, module):
    words = {'hub': ['export', '\x1b[2J', 'out'], 'weights': ['\x1b[2J', 'out.pth', '--to', 'timm']}[module]
    done = subprocess.run([sys.executable, '-m', f'timm_npu_irv2.{module}', *words], capture_output=True, text=True,
                          check=False, cwd=tmp_path)
    assert done.returncode == 2 and r'\x1b[2J: no such file' in done.stderr and '\x1b' not in done.stderr


@pytest.mark.parametrize('text', EVIL)
def test_json_for_the_terminal_is_printable_and_the_same(text):
    shown = to_json({text: [text]})
    assert shown.replace('\n', '').isprintable() and json.loads(shown) == {text: [text]}


@pytest.mark.parametrize('text', ['=1+1', '+1', '-1', '@SUM(A1)', '\t=1', '\n=1', '=cmd|" /C calc"!A0'])
def test_no_cell_of_a_table_is_a_formula(text):
    (header, row) = csv.reader(io.StringIO(to_csv([{'name': text, 'score': -0.5, text: 1}]), newline=''))
    assert row[0] == f"'{text}" and row[1] == '-0.5' and header[2] == f"'{text}"
    assert csv_cell('plain') == 'plain' and csv_cell('\r=1') == '\\r=1'


@pytest.mark.parametrize('text', ['`', '``', 'a`b', '`a', 'a```', '', ' ', 'two\nlines', '</code><script>'])
def test_a_code_span_ends_where_it_should(text):
    span = markdown_code(text)
    fence = span[:len(span) - len(span.lstrip('`'))]
    inner = span[len(fence):-len(fence)]
    assert span.endswith(fence) and fence not in inner and '\n' not in span
    assert inner.strip() == printable(text).strip()


@pytest.mark.parametrize('text', ['```', 'x: "```"\n```\n<script>', '~~~', '````'])
def test_a_block_of_code_ends_where_it_should(text):
    block = markdown_fence(text, 'yaml')
    fence = block[:block.index('yaml')]
    assert len(fence) >= 3 and block.count(fence) == 2 and block.endswith(f'\n{fence}')


def test_words_of_markdown_are_no_markup():
    text = markdown_text('<img src=x onerror=alert(1)> [a](b) `c` *d* _e_ ![f](g) &lt; \n# h | i')
    for active in ('<', '[', '`', '*', '_', '!', '&', '#', '|'):
        assert f'\\{active}' in text and text.count(active) == text.count(f'\\{active}')
    assert '\n' not in text


def test_a_word_that_is_too_long_for_a_line_is_cut():
    text = str(UserError(f"--dist-url '{'a' * 5000}': expected tcp://host:port."))
    assert text.startswith("--dist-url 'aaa") and text.endswith("': expected tcp://host:port.") and len(text) < 500


@pytest.mark.parametrize('mark', '\\`*_{}[]<>#&|~$!')
def test_no_character_of_a_text_is_markup(mark):
    assert markdown_text(f'a{mark}b') == f'a\\{mark}b'


@pytest.mark.parametrize(('text', 'span'), [
    ('a', '`a`'), ('`a', '`` `a ``'), ('a`', '`` a` ``'), (' ', '`   `'), ('', '`  `'),
])
def test_a_code_span_holds_any_text(text, span):
    assert markdown_code(text) == span
