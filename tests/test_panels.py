"Panels without a browser: their buttons are clicked, and what they show is read."
import ast
import asyncio
import json
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import ipywidgets as W
import pytest
from environments import COLAB, over_this_one
from small_student import small_student

from llm_distill.panels import (ChatPanel, CollectPanel, DistillPanel, EvaluatePanel, JobsPanel, ServePanel, Studio,
                                TeacherPanel)
from llm_distill.panels.base import Panel, end_all
from llm_distill.panels.look import row, uploaded
from llm_distill.teachers.loopback import LoopbackProvider

ROOT = Path(__file__).resolve().parent.parent
KEY = 'sk-not-to-be-seen-0123456789'
PROMPTS = [{'prompt': f'What is {a} and {b}?', 'topic': ('small', 'large')[a > 3]} for a in range(6) for b in range(2)]


def within(panel):
    yield panel.widget
    def inner(widget):
        for child in getattr(widget, 'children', ()): yield child; yield from inner(child)
    yield from inner(panel.widget)


async def until(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, 'it never happened'
        await asyncio.sleep(.02)


async def press(panel, button):
    button.click()
    await panel.idle()
    return panel.status.value


@pytest.fixture(scope='module')
def student(tmp_path_factory):
    return small_student(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='module')
def project(tmp_path_factory, student):
    "A folder with answers of that student, as a teacher."
    folder = tmp_path_factory.mktemp('project')
    (folder/'asked.jsonl').write_text('\n'.join(map(json.dumps, PROMPTS)))
    async def use():
        teacher = TeacherPanel('local', student)
        panel = CollectPanel(teacher, folder, path=str(folder/'asked.jsonl'), max_tokens=6, logprobs=5)
        said = await press(panel, panel.start_button)
        panel.close(); teacher.close()
        return said
    assert '12 answers are there: 12 asked' in asyncio.run(use())
    return folder


class Worker(Panel):
    "Works for as long as it is told."
    def __init__(self, work): self.work = work; super().__init__()
    def build(self):
        self.start = self.button('Start', lambda: self.begin(self.work))
        self.stop = self.button('Stop', self.halt, 'busy')
        return [row(self.start, self.stop)]
    def code(self): return '1/0'


def forever(job):
    job.stop.wait()
    return 'stopped'


def test_a_failing_job_says_why():
    def fail(job): raise RuntimeError('<b>the disk</b> is full')
    async def use():
        panel = Worker(fail)
        return await press(panel, panel.start), panel.start.disabled, panel.stop.disabled
    said, start, stop = asyncio.run(use())
    assert 'RuntimeError: &lt;b&gt;the disk&lt;/b&gt; is full' in said and 'ld-bad' in said
    assert (start, stop) == (False, True)


def test_a_handler_that_fails_says_why():
    panel = Worker(forever)
    broken = panel.button('Break', lambda: {}['no such key'])
    broken.click()
    assert 'KeyError' in panel.status.value


def test_what_comes_after_a_job_may_fail_too():
    async def use():
        panel = Worker(lambda job: 1)
        panel.begin(panel.work, lambda found: found.nothing)
        await panel.idle()
        return panel.status.value, panel.start.disabled
    said, disabled = asyncio.run(use())
    assert 'AttributeError' in said and not disabled


def test_start_and_stop():
    async def use():
        panel = Worker(forever)
        panel.start.click()
        at_work = panel.start.disabled, panel.stop.disabled, panel.busy
        panel.start.click()  # nothing may begin twice
        twice = panel.status.value
        said = await press(panel, panel.stop)
        return at_work, twice, said, panel.start.disabled
    at_work, twice, said, disabled = asyncio.run(use())
    assert at_work == (True, False, True) and 'at work' in twice and '■' in said and not disabled


def test_clicks_from_other_threads_change_widgets_on_the_loop_alone():
    async def use():
        panel, threads = Worker(forever), set()
        panel.status.observe(lambda _: threads.add(threading.current_thread()), 'value')
        for button in (panel.start, panel.stop):
            await asyncio.to_thread(button.click)
            await asyncio.sleep(.05)
        await panel.idle()
        return threads, threading.current_thread(), panel.status.value
    threads, here, said = asyncio.run(use())
    assert threads == {here} and '■' in said


def test_changes_are_brought_five_times_a_second():
    def count(job):
        for i in range(2000): job.show('step', shown.append, i); time.sleep(.0003)
    shown = []
    async def use():
        panel, started = Worker(count), time.monotonic()
        await press(panel, panel.start)
        return time.monotonic() - started
    seconds = asyncio.run(use())
    assert shown[-1] == 1999 and len(shown) <= 5*seconds + 3


def test_without_a_loop_work_is_shown_all_the_same():
    panel = Worker(lambda job: job.say('half way') or 'done')
    panel.start.click()
    panel_thread = panel.job and panel.job.thread
    if panel_thread: panel_thread.join(10)
    assert 'Done' in panel.status.value and not panel.start.disabled


def test_closing_ends_the_work():
    async def use(close):
        panel, seen = Worker(forever), []
        panel.start.click()
        seen.append(panel.job.thread)
        close(panel)
        await asyncio.to_thread(seen[0].join, 10)
        return seen[0].is_alive()
    assert not asyncio.run(use(lambda panel: panel.close()))
    assert not asyncio.run(use(lambda panel: end_all(.1)))


def test_a_cell_that_is_run_again_ends_what_it_showed_before():
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(kernel_name='python3')
    def run(cell, code): # As JupyterLab does; gives what was printed
        content = {'code': code, 'silent': False, 'store_history': True, 'user_expressions': {}, 'allow_stdin': False}
        sent = client.session.msg('execute_request', content, metadata={'cellId': cell})
        client.shell_channel.send(sent)
        said = []
        while True:
            told = client.get_iopub_msg(timeout=60)
            if told['parent_header'].get('msg_id') != sent['header']['msg_id']: continue
            assert told['msg_type'] != 'error', told['content']
            if told['msg_type'] == 'stream': said.append(told['content']['text'])
            if told['content'].get('execution_state') == 'idle': return ''.join(said)
    def busy(): return run('look', 'print([p.busy for p in made])').strip()
    def after(wanted):
        end = time.monotonic() + 30
        while busy() != wanted: assert time.monotonic() < end, busy(); time.sleep(.05)
    try:
        run('first', '''
from llm_distill.panels.base import Panel
made = []
class Waits(Panel):
    def __init__(self): super().__init__(); made.append(self); self.begin(lambda job: job.stop.wait())
    def code(self): return ''''')
        for cell in ('one', 'two', 'one'): run(cell, 'display(Waits())')
        after('[False, True, True]')  # the panel of the other cell goes on
        assert 'showed before was told to stop' in run('look', 'print(made[2].status.value)')
        run('two', 'display(made[1])')  # the same once more
        run('three', 'display(made[1])')  # and in two cells
        run('two', 'display(made[1].widget, Waits())')
        after('[False, True, True, True]')
        run('three', '1')
        after('[False, False, True, True]')
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_kernel_that_ends_leaves_no_worker(tmp_path):
    code = '''
import asyncio, os, time
from pathlib import Path
from llm_distill.panels.base import Panel
class Waits(Panel):
    def code(self): return ''
def work(job):
    job.stop.wait()
    Path('ended').write_text('in good order')
async def use():
    panel = Waits()
    panel.begin(work)
asyncio.run(use())'''
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path/'ended').read_text() == 'in good order'


def test_a_key_is_in_no_trait_and_no_code_and_no_error(tmp_path):
    with LoopbackProvider(key='another key') as provider:
        async def use():
            panel, seen = TeacherPanel('openai-compatible', 'loopback-1', provider.url), []
            for w in within(panel): w.observe(lambda c: seen.append(str(c)))
            panel.key.widget.value = KEY
            said = await press(panel, panel.ask_button)
            states = [w.get_state() for w in within(panel)]
            panel.close()
            return said, states, seen
        said, states, seen = asyncio.run(use())
    assert 'does not accept the API key' in said and '***' in said
    import nbformat
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('1', outputs=[nbformat.v4.new_output(
        'display_data', {'text/plain': repr(states)})])])
    kept = json.loads(json.dumps(states, default=str))
    notebook.metadata.widgets = {'application/vnd.jupyter.widget-state+json': kept}
    nbformat.write(notebook, tmp_path/'saved.ipynb')
    assert 'getpass' in (tmp_path/'saved.ipynb').read_text()  # the code asks for it
    assert KEY not in (tmp_path/'saved.ipynb').read_text()
    assert [KEY in told for told in seen].count(True) <= 2  # the Password's: as it came, and as it went


def test_a_key_given_in_python_is_in_no_code():
    panel = TeacherPanel('openai', 'gpt-4o-mini', api_key=KEY)
    assert panel.key.key.reveal() == KEY and KEY not in str([w.get_state() for w in within(panel)])
    assert KEY not in ServePanel('smollm2', api_keys=[KEY]).code()
    panel.close()


def test_teacher_answers_and_is_probed():
    with LoopbackProvider() as provider:
        async def use():
            panel = TeacherPanel('openai-compatible', 'loopback-1', provider.url, question='one two three')
            heard = []
            panel.listeners.append(lambda: heard.append(1))
            said = [await press(panel, b) for b in (panel.ask_button, panel.probe_button)]
            teacher = panel.make()
            panel.model.value = 'another-model'
            return panel, said, teacher is panel.make(), heard
        panel, said, same, heard = asyncio.run(use())
        assert 'loopback-1 answered' in said[0] and 'one two three' in panel.answer.value
        assert 'up to 20' in panel.card.value and not same and len(heard) == 2
        exec(panel.code(), {'print': lambda *words: None})
        assert panel.run().text.strip() == 'one two three'
        panel.provider.value = 'local'
        assert panel.base_url.layout.display == 'none' or panel._away[1].layout.display == 'none'


def test_teacher_stops():
    with LoopbackProvider(delay_s=30) as provider:
        async def use():
            panel = TeacherPanel('openai-compatible', 'loopback-1', provider.url)
            panel.ask_button.click()
            await until(lambda: provider.requests)
            started = time.monotonic()
            return await press(panel, panel.stop_button), time.monotonic() - started
        said, seconds = asyncio.run(use())
    assert seconds < 10 and '30' not in said


def test_collecting_is_estimated_stopped_resumed_and_browsed(tmp_path):
    with LoopbackProvider(delay_s=.05) as provider:
        async def use():
            teacher = TeacherPanel('openai-compatible', 'loopback-1', provider.url)
            panel = CollectPanel(teacher, tmp_path/'p', '\n'.join(f'question {i}' for i in range(60)), max_tokens=5)
            empty, plan = panel.table.value, await press(panel, panel.estimate_button)
            panel.start_button.click()
            await until(lambda: len(provider.requests) > 4)
            stopped = await press(panel, panel.stop_button)
            word = panel.start_button.description
            done = await press(panel, panel.start_button)
            panel.search.value = 'question 59'
            return panel, empty, plan, stopped, word, done
        panel, empty, plan, stopped, word, done = asyncio.run(use())
        assert 'No answers yet' in empty and '60 to ask' in plan
        assert 'Press Resume' in stopped and word == 'Resume'
        assert '60 answers are there' in done and len(provider.requests) == 60
        assert 'showing all 1 answer' in panel.table.value and 'token by token' in panel.table.value
        assert '<script' not in panel.table.value
        exec(panel.code(), found := {})
        assert found['answers'].from_cache == 60 and len(panel.run()) == 60 and len(provider.requests) == 60


def test_what_a_teacher_is_asked_goes_on_while_another_is_chosen(tmp_path):
    with LoopbackProvider(delay_s=.05) as provider:
        async def use():
            teacher = TeacherPanel('openai-compatible', 'loopback-1', provider.url)
            panel = CollectPanel(teacher, tmp_path, '\n'.join(f'question {i}' for i in range(60)), max_tokens=5)
            panel.start_button.click()
            await until(lambda: len(provider.requests) > 4)
            first, asking, ended = teacher.make(), panel.job.thread, []
            close, first.close = first.close, lambda: ended.append(not asking.is_alive()) or close()
            teacher.model.value = 'loopback-2'
            await panel.idle()
            await until(lambda: ended)
            return panel.status.value, ended, teacher.make() is first
        said, ended, same = asyncio.run(use())
    assert '60 answers are there: 60 asked' in said and ended == [True] and not same


def test_errors_of_collecting_are_counted_by_kind(tmp_path):
    (tmp_path/'asked.jsonl').write_text('{"prompt": "good"}\n{"prompt": ""}\n{"question": "what?"}\n')
    with LoopbackProvider() as provider:
        async def use():
            teacher = TeacherPanel('openai-compatible', 'loopback-1', provider.url)
            panel = CollectPanel(teacher, tmp_path, path=str(tmp_path/'asked.jsonl'))
            return await press(panel, panel.start_button), panel
        said, panel = asyncio.run(use())
    assert '1 answers are there' in said and '>BadInput</td><td>2<' in panel.errors.value
    (tmp_path/'asked.jsonl').write_text('{"prompt": "another"}')
    with LoopbackProvider(status=400) as provider:
        said, panel = asyncio.run(use())
    assert 'told to fail' in said and 'ld-bad' in said


def test_prompts_of_a_file_of_this_computer_and_of_the_package(tmp_path):
    with LoopbackProvider() as provider:
        teacher = TeacherPanel('openai-compatible', 'loopback-1', provider.url)
        panel = CollectPanel(teacher, tmp_path)
        panel.source.value = 'data'
        panel.rows.value = 3
        assert [set(p) for p in panel.asked()] == [{'topic', 'split', 'prompt'}]*3
        assert 'demo_prompts()[:3]' in panel.code_box.value
        class Chosen:
            value = {'q.txt': {'content': b'one\ntwo'}} if W.__version__ < '8' else \
                    ({'name': 'q.txt', 'content': memoryview(b'one\ntwo')},)
        assert uploaded(Chosen) == [('q.txt', b'one\ntwo')]
        (tmp_path/'q.txt').write_text('one\ntwo')
        panel.source.value, panel.path.value = 'file', str(tmp_path/'q.txt')
        assert panel.asked() == ['one', 'two']
        panel.path.value = str(tmp_path/'nowhere.txt')
        panel.start_button.click()
        assert 'nowhere.txt' in panel.status.value and 'ld-bad' in panel.status.value


SMALL = dict(max_steps=8, per_device_train_batch_size=4, sample_frequency=4, sample_tokens=4, use_cpu=True)


def test_distilling_pauses_stops_resumes_and_is_judged(project, student):
    async def use():
        panel = DistillPanel(project, student, 1, **SMALL)
        assert '12' in panel.targets.value
        panel.start_button.click()
        await until(lambda: panel.points or not panel.busy)
        panel.pause_button.click()
        paused = panel.status.value, panel.pause_button.description
        await until(lambda: panel.job.held)
        await asyncio.sleep(.5)
        held = panel.points[-1]['step'], panel.bar.value
        await asyncio.sleep(.3)
        assert held == (panel.points[-1]['step'], panel.bar.value)
        panel.stop_button.click()
        await panel.idle()
        stopped = panel.status.value
        done = await press(panel, panel.resume_button)
        panel.run_name.value = 'run-2'
        again = await press(panel, panel.start_button)
        panel.overlay.value = 'run-1'
        return panel, paused, stopped, done, again
    panel, paused, stopped, done, again = asyncio.run(use())
    assert 'Paused' in paused[0] and paused[1] == 'Go on' and panel.pause_button.description == 'Pause'
    assert 'Press Resume' in stopped and 'The student is in' in done and 'The student is in' in again
    assert 'teacher' in panel.samples.value and 'perplexity' in panel.scores.value
    assert panel.chart.widget.value[:4] == b'\x89PNG' and panel.chart.widget.layout.display is None
    told = json.loads((project/'runs/run-1/train.json').read_text())
    assert {'curve', 'before', 'after'} <= set(told) and told['curve'][-1]['learning_rate'] >= 0
    assert {'run-1', 'run-2'} == set(panel.project.runs())
    ast.parse(panel.code())


@pytest.mark.slow
def test_distilling_in_one_cell_and_as_code(project, student, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    panel = DistillPanel(project, student, 1, **SMALL | {'max_steps': 2})
    panel.run_name.value = 'in-a-cell'
    assert panel.run().folder == project/'runs/in-a-cell/student'
    panel.run_name.value = 'by-code'
    exec(panel.code(), found := {})
    assert found['done'].folder == project/'runs/by-code/student'


def test_an_error_of_training_is_shown(project):
    async def use():
        panel = DistillPanel(project, '/no/such/model', 1)
        return await press(panel, panel.start_button), panel.start_button.disabled
    said, disabled = asyncio.run(use())
    assert '/no/such/model' in said and 'ld-bad' in said and not disabled


def test_judging_shows_topics_and_examples_and_asks_blindly(project, student):
    async def use():
        panel = EvaluatePanel(project, student, heldout=.5, max_tokens=4)
        said = await press(panel, panel.start_button)
        while not panel.choose[0].disabled: panel.choose[0].click()
        return panel, said
    panel, said = asyncio.run(use())
    assert 'Judged on 6 prompts' in said and 'agreement' in panel.table.value
    assert 'small' in panel.topics.value and 'What is' in panel.worst.value
    assert not panel.pairs or 'You preferred' in panel.verdict.value
    assert panel.worst.layout.display is None
    exec(panel.code(), found := {})
    assert found['scores'][student].kl == pytest.approx(panel.scores[student].kl)


def test_chat_streams_side_by_side_and_one_that_fails_says_why(student):
    with LoopbackProvider() as provider:
        async def use():
            panel, pieces = ChatPanel([student, provider.url, 'no-such-model'], max_tokens=400), []
            panel.said[0].observe(lambda c: pieces.append(c['new']), 'value')
            said = await press(panel, panel.ask_button)
            return panel, said, pieces
        panel, said, pieces = asyncio.run(use())
        assert '2 of 3 models answered' in said and 'ld-bad' in panel.said[2].value
        assert 'Why is the sky' in panel.said[1].value and 'tokens per s' in panel.said[0].value
        assert any('writing' in p for p in pieces) and 'per 1000 answers' in panel.said[0].value
        panel.models[2].value = ''
        exec(panel.code(), {'print': lambda *words: None})
        assert set(panel.run()) == {student, provider.url}


@pytest.mark.slow
def test_serving_starts_is_called_and_stops(student):
    async def use():
        panel = ServePanel(student)
        panel.start_button.click()
        await until(lambda: panel.url.value or not panel.busy)
        url = panel.server.url
        body = json.dumps({'model': 'student', 'messages': [{'role': 'user', 'content': 'Hi'}], 'max_tokens': 4})
        request = urllib.request.Request(f'{url}/chat/completions', body.encode(), {'content-type': 'application/json'})
        await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=30).read())
        await until(lambda: 'requests <b>1</b>' in panel.live.value)
        shown, running = panel.snippets.value, panel.status.value
        chat = ChatPanel([url], max_tokens=8)
        pieces = []
        chat.said[0].observe(lambda c: pieces.append(c['new']), 'value')
        said = await press(chat, chat.ask_button)
        process = panel.server.process
        stopped = await press(panel, panel.stop_button)
        return url, shown, running, said, pieces, stopped, process.poll(), panel
    url, shown, running, said, pieces, stopped, ended, panel = asyncio.run(use())
    assert url in shown and 'from openai import OpenAI' in shown and url in running
    assert '1 of 1 answered' in said and 'server has stopped' in stopped and ended is not None and panel.server is None


def test_serving_nothing_says_so():
    async def use():
        panel = ServePanel('/no/such/model')
        return await press(panel, panel.start_button)
    assert '/no/such/model' in asyncio.run(use())


def test_jobs_are_sent_watched_and_cancelled(project, tmp_path):
    async def use():
        panel = JobsPanel(project=tmp_path, every=.3)
        panel.file.value, panel.steps.value = str(project/'cache.db'), 100_000
        panel.here_button.click()
        await until(lambda: 'looking every' in panel.status.value or not panel.busy)
        panel.submit_button.click()
        await until(lambda: panel.jobs)
        panel.cancel_button.click()
        await until(lambda: any(j.status == 'cancelled' for j in panel.jobs.values()))
        await until(lambda: 'cancelled' in panel.detail.value)
        states, log = panel.table.value, panel.log.value
        said = await press(panel, panel.stop_button)
        panel.close()
        return states, log, said
    states, log, said = asyncio.run(use())
    assert 'cancelled' in states and 'Log' in log and 'Disconnected' in said
    lines = log.partition('<pre>')[2].splitlines()
    assert len(lines) > 1 and len(set(lines)) == len(lines)  # what was heard in one look is not heard in the next


def test_jobs_of_nobody_say_so():
    async def use():
        panel = JobsPanel(base_url='http://127.0.0.1:9/v1')
        return await press(panel, panel.connect_button)
    assert '127.0.0.1:9' in asyncio.run(use())


def test_studio_hands_on_what_was_made(project, student):
    async def use():
        studio = Studio(project, provider='local', model=student)
        titles = [studio.tabs.get_title(i) for i in range(len(studio.panels))]
        studio.tabs.selected_index = 5
        students = studio.serve.model.options
        for panel in studio.panels: ast.parse(panel.code_box.value)
        studio.chat.models[1].value = ''
        said = await press(studio.chat, studio.chat.ask_button)
        studio.close()
        return titles, students, said
    titles, students, said = asyncio.run(use())
    assert titles == ['Teacher', 'Collect', 'Distil', 'Evaluate', 'Chat', 'Serve', 'Jobs']
    assert 'smollm2' in students and '1 of 1 answered' in said


def test_every_field_has_a_label_and_every_panel_its_code():
    studio = Studio('nowhere')
    for panel in studio.panels:
        for widget in within(panel):
            if isinstance(widget, W.HTML | W.FloatProgress | W.Accordion) or 'ld-code' in widget._dom_classes: continue
            assert getattr(widget, 'description', 'none needed'), (panel.name, widget)
        assert panel.title and panel.help and panel.code_box.disabled
    studio.close()


def test_studio_without_voila_says_what_to_install(monkeypatch):
    from llm_distill.panels import studio
    monkeypatch.setattr(studio, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "llm_distill\[lab\]"'): studio.run_studio()


@pytest.mark.slow
def test_all_this_under_the_widgets_of_colab(tmp_path):
    "ipywidgets 7.7.1 with its kernel, over the packages of this environment."
    if W.__version__.startswith('7'): pytest.skip('these are the widgets of Colab')
    python = over_this_one(tmp_path/'venv', *COLAB)
    done = subprocess.run([python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
