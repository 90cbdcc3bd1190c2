"serve.ps1: parsed, not run; its parameters, its help and the names that it sets."
import re
from importlib.resources import files

import pytest
from conftest import ROOT
from test_docker import OPTIONS

SCRIPT = files('llm_distill')/'data/serve.ps1'
TEXT = SCRIPT.read_text(encoding='ascii')  # PowerShell 5 reads a file without a mark in the machine's own code page
# Of Get-Verb, as far as they are used here.
VERBS = {'Find', 'Get', 'Install', 'Invoke', 'Join', 'New', 'Out', 'Read', 'Remove', 'Select', 'Set', 'Split', 'Start',
         'Stop', 'Test', 'Write'}


@pytest.fixture(scope='module')
def tree():
    grammar, sitter = pytest.importorskip('tree_sitter_powershell'), pytest.importorskip('tree_sitter')
    return sitter.Parser(sitter.Language(grammar.language())).parse(TEXT.encode()).root_node


def nodes(node, *kinds):
    if node.type in kinds: yield node
    for child in node.children: yield from nodes(child, *kinds)


def text(node): return node.text.decode()


def parameters():
    "Names of the script's parameters, in their order."
    block = TEXT[TEXT.index('[CmdletBinding()]'):TEXT.index('Set-StrictMode')]
    return re.findall(r'^    \[[\w\[\]]+\]\$(\w+)', block, re.M)


def names():
    "The table from parameters to names of the environment."
    return dict(re.findall(r"^    (\w+) +?= '([A-Z_]+)'$", TEXT, re.M))


def test_it_is_powershell(tree):
    assert not tree.has_error
    assert len(list(nodes(tree, 'function_statement'))) == 4 and len(list(nodes(tree, 'param_block'))) == 4


def test_a_broken_script_would_be_found(tree):
    import tree_sitter
    import tree_sitter_powershell
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_powershell.language()))
    for wrong in (TEXT.replace('finally {', 'finally', 1), TEXT.replace("'serve'", "'serve"), TEXT + '}',
                  TEXT.replace('param(', 'param', 1)):
        assert parser.parse(wrong.encode()).root_node.has_error


def test_commands_have_approved_verbs_and_whole_names(tree):
    used = {text(n) for n in nodes(tree, 'command_name')}
    functions = {text(n) for n in nodes(tree, 'function_name')}
    assert functions <= used and functions == {'Find-Python', 'Invoke-Checked', 'Install-Server', 'Start-Server'}
    assert {n.split('-')[0] for n in used} <= VERBS, used  # no aliases, and no Invoke-Expression
    assert 'Invoke-Expression' not in used


def test_calls_of_its_own_functions_name_parameters_that_they_have(tree):
    declared = {}
    for function in nodes(tree, 'function_statement'):
        own = [text(p) for p in nodes(function, 'script_parameter')]
        name = text(next(nodes(function, 'function_name')))
        declared[name] = {re.findall(r'\$(\w+)', p)[0].lower() for p in own}
    calls = [n for n in nodes(tree, 'command') if text(next(nodes(n, 'command_name'), n)) in declared]
    assert len(calls) >= len(declared)
    for call in calls:
        elements = [c for part in call.children if part.type == 'command_elements' for c in part.children]
        given = {text(c).lstrip('-').lower() for c in elements if c.type == 'command_parameter'}
        assert given == declared[text(next(nodes(call, 'command_name')))], text(call)


def test_every_variable_is_set_before_it_is_read(tree):
    "Under Set-StrictMode any other is an error."
    known = {'_', 'true', 'false', 'null', 'lastexitcode', 'psscriptroot', 'psboundparameters'}
    known |= {p.lower() for p in parameters()}
    known |= {re.findall(r'\$(\w+)', text(p))[0].lower() for p in nodes(tree, 'script_parameter')}
    known |= {v.lower() for v in re.findall(r'\$(\w+) (?:=|\+=|in) ', TEXT)}
    used = {v.lower() for v in re.findall(r'[$@](\w+)(?!\w*:)', re.sub(r'<#.*?#>', '', TEXT, flags=re.S))}
    assert used - known - {'env'} == set()


def test_strict_from_the_start():
    code = TEXT[TEXT.index('Set-StrictMode'):]
    assert code.startswith("Set-StrictMode -Version Latest\n$ErrorActionPreference = 'Stop'\n")
    assert TEXT.startswith('#Requires -Version 5.1\n')


def test_every_parameter_has_help_and_a_use():
    explained = re.findall(r'^\.PARAMETER (\w+)\n(\S.+)', TEXT, re.M)
    assert [n for n, _ in explained] == parameters() and len(parameters()) == 13
    code = TEXT[TEXT.index('Set-StrictMode'):]
    assert all(n in names() or f'${n}' in code for n in parameters())
    for part in ('SYNOPSIS', 'DESCRIPTION', 'EXAMPLE'): assert f'\n.{part}\n' in TEXT


def test_every_name_that_it_sets_is_read_by_the_command():
    assert set(names()) <= set(parameters())
    keys = {'LLM_DISTILL_API_KEY', 'LLM_DISTILL_API_KEY_FILE'}
    assert set(names().values()) == OPTIONS - keys  # tests/test_docker.py asks the command for each
    assert set(re.findall(r'\$env:(\w+)', TEXT)) <= OPTIONS


def test_the_key_is_on_no_command_line():
    assert '-AsSecureString' in TEXT and 'ApiKey' not in parameters()
    assert re.findall(r'-ArgumentList (.+?) -', TEXT) == ["'serve'"]


def test_what_the_documents_say_fits():
    said = (ROOT/'nbs/10_serving.vllm.ipynb').read_text(encoding='utf-8')
    line = next(x for x in said.split('\\n') if 'serve.ps1 -' in x)
    assert r'llm_distill\\data\\serve.ps1' in line.replace('\\\\\\\\', '\\\\')
    assert set(re.findall(r' -([A-Z]\w+)', line.split('serve.ps1')[1])) <= set(parameters())
    assert '.ps1' not in (ROOT/'.gitignore').read_text() and "'data/*'" in (ROOT/'setup.py').read_text()  # it ships
