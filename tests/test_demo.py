"The main job, from the command line, on real parts."
import json
import os
import signal
import sqlite3
import subprocess
import time

import pytest
from conftest import SCRIPT


def start(*words):
    return subprocess.Popen([SCRIPT, 'demo', *map(str, words)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def rows(db):
    "Answers in a cache that somebody else is writing."
    try:
        with sqlite3.connect(f'file:{db}?mode=ro', uri=True, timeout=5) as c:
            return c.execute('select count(*) from answer').fetchone()[0]
    except sqlite3.Error: return 0


def servers():
    "Processes that serve a model."
    ps = subprocess.run(['ps', '-eo', 'pid,args'], capture_output=True, text=True).stdout
    return {int(line.split()[0]) for line in ps.splitlines() if 'serving.process import _child' in line}


def run(*words):
    process = start(*words)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope='module')
def killed_and_finished(tmp_path_factory):
    "A demo that was killed while it asked, and then run to its end."
    out, others = tmp_path_factory.mktemp('demo')/'out', servers()
    victim = start('--fast', '--out', out)
    deadline = time.monotonic() + 300
    while rows(out/'cache.db') < 5:
        assert victim.poll() is None and time.monotonic() < deadline, 'the demo ended or never asked'
        time.sleep(.05)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    deadline = time.monotonic() + 15
    while servers() - others and time.monotonic() < deadline: time.sleep(.2)
    assert not servers() - others, 'a server outlived its parent'
    kept = rows(out/'cache.db')
    said = run('--fast', '--out', out)
    return out, kept, said, json.loads((out/'report.json').read_text())


def test_asks_only_what_is_missing(killed_and_finished):
    out, kept, said, report = killed_and_finished
    assert report['from_cache'] == kept >= 5 and report['asked'] > 0
    assert report['asked'] + kept == rows(out/'cache.db')
    assert str(out) in said


def test_the_student_learns(killed_and_finished):
    *_, report = killed_and_finished
    before, after = report['before'], report['after']
    assert after['agreement'] >= 3*max(before['agreement'], .01)
    assert after['kl'] <= before['kl']/3 and after['perplexity'] < before['perplexity']/100
    assert [p['step'] for p in report['curve']] == sorted(p['step'] for p in report['curve'])


def test_the_report_is_one_page(killed_and_finished):
    out, *_, report = killed_and_finished
    page = (out/'report.html').read_text()
    assert '<svg' in page and 'src=' not in page and report['price']['model'] in page
    assert len(report['samples']) == 4


def test_the_student_is_an_ordinary_folder(killed_and_finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    *_, report = killed_and_finished
    model = AutoModelForCausalLM.from_pretrained(report['student'])
    tokenizer = AutoTokenizer.from_pretrained(report['student'])
    assert model.config.num_hidden_layers == 10 and tokenizer.chat_template


@pytest.mark.slow
def test_a_second_run_asks_nothing_and_finds_the_same_figures(killed_and_finished):
    out, *_, first = killed_and_finished
    run('--fast', '--out', out)
    second = json.loads((out/'report.json').read_text())
    assert second['asked'] == 0
    for name in ('before', 'after', 'curve'): assert second[name] == first[name]


@pytest.mark.slow
def test_the_whole_demo_twice_from_nothing(tmp_path):
    "The same seed gives the same figures, answers included; the student is at least three times closer."
    reports = []
    for name in 'ab':
        run('--out', tmp_path/name)
        reports.append(json.loads((tmp_path/name/'report.json').read_text()))
    a, b = reports
    assert a['asked'] == b['asked'] == 192
    for name in ('before', 'after', 'curve'): assert a[name] == b[name]
    assert a['samples'] == b['samples']
    assert a['after']['agreement'] >= 3*a['before']['agreement'] and a['after']['kl'] <= a['before']['kl']/3


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    run('--fast', '--out', tmp_path/'out', '--device', 'cuda')
    report = json.loads((tmp_path/'out'/'report.json').read_text())
    assert report['device'] == 'cuda' and report['after']['kl'] < report['before']['kl']/2
