"What is wrong is said in one line that says what to do, with a non-zero exit code."
import os

import socket
import sys

import pytest



def one_line(done, *words):
    assert done.returncode not in (0, None), done.stdout
    assert done.stderr.count('\n') == 1 and 'Traceback' not in done.stderr, done.stderr
    for word in words: assert word in done.stderr
    return done.stderr


@pytest.mark.parametrize('verb', [['serve'], ['demo', '--teacher']])
def test_no_such_model_folder(command, tmp_path, verb):
    one_line(command(*verb, './no/such/model', cwd=tmp_path), 'no model folder', 'give a folder')


def test_a_folder_without_a_model(command, tmp_path):
    one_line(command('serve', tmp_path), 'no config.json')


def test_a_port_in_use(command):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        one_line(command('serve', 'smollm2', '--port', taken.getsockname()[1]), 'choose another port')


def test_an_output_folder_that_cannot_be_written(command, tmp_path):
    (tmp_path/'file').write_text('')
    one_line(command('demo', '--out', tmp_path/'file'/'out'), '--out')
    if os.geteuid():  # root may write anywhere
        tmp_path.chmod(0o500)
        one_line(command('demo', '--out', tmp_path), '--out')
    elif sys.platform == 'linux': one_line(command('demo', '--out', '/proc/out'), '--out')


@pytest.mark.parametrize('text, words', [('', 'holds no prompts'), ('\n \n', 'holds no prompts'), ('one\n', 'too few')])
def test_prompts_that_are_none(command, tmp_path, text, words):
    (tmp_path/'prompts.txt').write_text(text)
    one_line(command('demo', '--prompts', tmp_path/'prompts.txt', '--out', tmp_path/'out'), words)


def test_prompts_that_are_not_there(command, tmp_path):
    one_line(command('demo', '--prompts', tmp_path/'none.txt', '--out', tmp_path/'out'), 'cannot read prompts')


@pytest.mark.parametrize('content', [b'no database at all', b'SQLite format 3\0' + b'\xff'*4096])
def test_a_corrupt_cache_is_left_alone(command, tmp_path, content):
    (tmp_path/'cache.db').write_bytes(content)
    one_line(command('demo', '--out', tmp_path), 'cache.db', 'left untouched')
    assert (tmp_path/'cache.db').read_bytes() == content


def test_unknown_price_and_device(command, tmp_path):
    one_line(command('demo', '--out', tmp_path, '--price-as', 'nobody'), 'no known price')
    one_line(command('demo', '--out', tmp_path, '--device', 'nothing'), 'no device')


