"The cache: a key of all that shapes an answer, one file that several may share, that no kill and no full disk harms."
import json
import multiprocessing
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from contextlib import closing
from dataclasses import asdict

import numpy as np
import pytest
from llm_distill import TeacherCache
from llm_distill.database import check_drive, drive_of
from llm_distill.packing import Vocabulary, as_arrays, pack, unpack, unpack_all
from llm_distill.query import Query, request_key
from llm_distill.types import BadInput, CacheError, Completion, TokenLogprobs, Usage

SPAWN = multiprocessing.get_context('spawn')
OURS = 0x4C4C4D44


def ask(what, k: int|None = None, sample: int = 0, **more) -> Query:
    top = {} if k is None else {'logprobs': True, 'top_logprobs': k}
    return Query('here', {'model': 'm', 'messages': [{'role': 'user', 'content': f'{what}'}], **top, **more}, sample)


def view(words: list, k: int = 20, seed=0, vocabulary: int = 500) -> TokenLogprobs:
    "A view of an answer: one of the likeliest at each place, the others from a vocabulary, the usual ones more often."
    rng = np.random.default_rng([seed, len(words), k])
    top, logprobs = [], []
    for word in words:
        others = dict.fromkeys(b' t%d' % i for i in np.minimum(rng.zipf(1.3, 6*k + 30), vocabulary)) if k else ()
        top.append([word, *(t for t in others if t != word)][:k])
        x = np.sort(rng.normal(0, 3, len(top[-1]) + 60))[::-1]
        logprobs.append((x - np.log(np.exp(x).sum()))[:len(top[-1])].astype(np.float32))
    said = np.array([row[0] if len(row) else -1. for row in logprobs], np.float32)
    return TokenLogprobs(words, said, top, logprobs)


def same(found: TokenLogprobs, rows: TokenLogprobs, k: int|None = None) -> bool:
    close = all(np.allclose(a, b[:k], rtol=1e-3, atol=3e-3, equal_nan=True) for a, b in
                zip(found.top_logprobs, rows.top_logprobs))
    return close and found.tokens == rows.tokens and found.top_tokens == [row[:k] for row in rows.top_tokens]


def refused_untouched(path, match='left untouched'):
    before = path.read_bytes()
    with pytest.raises(CacheError, match=match): TeacherCache(path)
    assert path.read_bytes() == before


# The key


@pytest.mark.parametrize('other', [
    {'model': 'n'}, {'temperature': .5}, {'vendor_field': 1}, {'vendor_field': None}, {'nested': {'a': [1, {'b': 2}]}},
    {'logprobs': True}, {'messages': []}, {'stop': ['a', 'b']}, {'stop': ['b', 'a']}], ids=str)
def test_all_of_a_request_is_in_its_key(other):
    base = ask('Hello').request
    assert Query('here', base | other).key != Query('here', base).key


def test_where_and_which_sample_are_in_the_key_and_order_is_not():
    base = ask('Hello').request
    assert len({Query(*q).key for q in (('a', base), ('b', base), ('a', base, 1), ('a', base, 2))}) == 4
    assert Query('a', dict(reversed(base.items()))).key == Query('a', base).key == request_key('a', base)
    assert Query('a', {'stop': ['a', 'b']}).key != Query('a', {'stop': ['b', 'a']}).key
    assert len(request_key('a', {'x': '\ud83d'})) == 32, 'half a character is a text too'


def test_a_number_is_the_same_with_or_without_a_point():
    assert ask('Hello', temperature=0).key == ask('Hello', temperature=0.).key


def test_a_longer_list_serves_a_shorter_one_and_text(tmp_path):
    rows = view([b'Hel', b'lo'])
    with TeacherCache(tmp_path/'a.db') as cache:
        cache.put(ask(1, 20), Completion('Hello', logprobs=rows))
        five, text = cache.get(ask(1, 5)), cache.get(ask(1))
        assert same(five.logprobs, rows, 5) and five.cached and text.text == 'Hello' and text.logprobs is None
        kept = sum(np.exp(np.float64(rows.top_logprobs[0][:5])))
        assert five.logprobs.tail[0] == pytest.approx(1 - kept, abs=1e-3)
        for other in (ask(1, 21), ask(1, 5, sample=1), ask(1, 5, temperature=1), ask(2, 5)): assert other not in cache
        cache.put(ask(3), Completion('text'))
        assert ask(3, 1) not in cache and ask(3, 0) not in cache


def test_the_first_answer_stays_unless_it_was_put_aside(tmp_path):
    with TeacherCache(tmp_path/'a.db') as cache:
        assert cache.put(ask(1), Completion('first')) and not cache.put(ask(1), Completion('second'))
        assert cache.put(ask(2), Completion('cut', 'length'), aside=True) and ask(2) not in cache and len(cache) == 1
        assert cache.put(ask(2), Completion('whole')) and not cache.put(ask(2), Completion('late'), aside=True)
        assert [cache.get(ask(i)).text for i in (1, 2)] == ['first', 'whole'] and len(cache) == 2


def test_what_was_put_aside_hides_nothing(tmp_path):
    with TeacherCache(tmp_path/'a.db') as cache:
        cache.put(ask(1, 5), Completion('cut', 'length', logprobs=view([b'cut'], 5)), aside=True)
        cache.put(ask(1, 20), Completion('whole', logprobs=view([b'whole'])))
        assert cache.get(ask(1, 5)).text == 'whole'
        assert not cache.find(ask(1, 5), aside=True).aside, 'a run asks this again'


# What is packed


def random_view(rng: np.random.Generator) -> TokenLogprobs:
    "Anything that a provider might say."
    length, most = rng.integers(0, 12), rng.integers(0, 40)
    odd = [b'\xff', b'\xe6\x97', b'', 'é'.encode(), b'a', b'<', b'\x00']
    def token(): return odd[rng.integers(len(odd))] if rng.random() < .2 else b't%d' % rng.integers(300)
    def numbers(n):
        x = -np.sort(rng.exponential(4, n)).astype(np.float32)
        return np.where(rng.random(n) < .1, rng.choice([-9999., -np.inf, np.nan, 0., -1e-9], n), x).astype(np.float32)
    sizes = rng.integers(0, most + 1, length) if rng.random() < .5 else np.full(length, most)
    top = [list(dict.fromkeys(token() for _ in range(n))) for n in sizes]
    said = [row[rng.integers(len(row))] if row and rng.random() < .8 else token() for row in top]
    told = length and rng.random() < .3 and all(top)
    return TokenLogprobs(said, numbers(length), top, [numbers(len(row)) for row in top],
                         [rng.integers(0, 99_999, len(row)) for row in top] if told else None)


@pytest.mark.filterwarnings('error')
def test_whatever_is_packed_comes_back():
    rng, vocabulary, packed, views = np.random.default_rng(1), Vocabulary(), [], []
    for _ in range(400):
        rows = random_view(rng)
        packed.append(pack(as_arrays(rows, vocabulary)))
        views.append(rows)
        found = unpack(packed[-1]).rows(vocabulary)
        assert same(found, rows) and np.allclose(found.logprobs, rows.logprobs, 1e-3, 3e-3, equal_nan=True)
        if rows.top_ids: assert [i.tolist() for i in found.top_ids] == [i.tolist() for i in rows.top_ids]
    arrays, begins = unpack_all(packed)
    assert begins[-1] == len(arrays) == sum(map(len, views))
    assert [vocabulary.tokens[i][0] for i in arrays.chosen] == [t for rows in views for t in rows.tokens]


@pytest.mark.parametrize('k', [1, 2, 20, 300])
def test_packing_moves_a_distribution_by_less_than_a_millionth(k):
    rows, vocabulary = view([b'w%d' % i for i in range(400)], k, vocabulary=50_000), Vocabulary()
    found = unpack(pack(as_arrays(rows, vocabulary)))
    p, q = np.float64(np.stack(rows.top_logprobs)), np.float64(found.logprobs)
    tail = 1 - np.exp(p).sum(1)
    kl = (np.exp(p)*(p - q)).sum(1) + tail*np.log(tail/np.float64(found.tail))
    assert np.allclose(found.tail, tail, rtol=5e-3) and abs(kl.mean()) < 1e-6, (kl.mean(), kl.max())


def test_seventy_thousand_tokens_and_more_alternatives_than_any_provider_gives(tmp_path):
    names = [b'n%d' % i for i in range(70_000)]
    rows = TokenLogprobs(names[::700], np.full(100, -1., np.float32), [names[i:i + 700] for i in range(0, 70_000, 700)],
                         [np.linspace(-1, -9, 700, dtype=np.float32)]*100)
    with TeacherCache(tmp_path/'a.db') as cache: cache.put(ask(1, 700), Completion('x', logprobs=rows))
    with TeacherCache(tmp_path/'a.db') as cache:
        assert same(cache.get(ask(1, 700)).logprobs, rows)
        cache.put(ask(2, 3), Completion('y', logprobs=view([names[-1], b'new'], 3)))
        assert cache.get(ask(2, 3)).logprobs.tokens == [names[-1], b'new']


def test_a_token_of_twenty_alternatives_takes_ninety_bytes_at_most_on_the_disk(tmp_path):
    words, rng, tokens = [b' t%d' % i for i in range(1, 30_000)], random.Random(0), 0
    with TeacherCache(tmp_path/'a.db') as cache:
        for i in range(250):
            said = [words[min(int(rng.paretovariate(.7)), len(words)) - 1] for _ in range(rng.randrange(100, 300))]
            answer = Completion(b''.join(said).decode(), 'stop', Usage(30, len(said)),
                                logprobs=view(said, seed=i, vocabulary=30_000))
            cache.put_later(ask(f'Question {i} ' + ' '.join(f'{rng.random()}' for _ in range(8)), 20), answer)
            tokens += len(said)
    assert not (tmp_path/'a.db-wal').exists()
    assert (size := (tmp_path/'a.db').stat().st_size/tokens) <= 90, size


def test_ids_are_kept_where_the_first_place_has_no_alternatives():
    rows = TokenLogprobs([b'a', b'b'], np.array([np.nan, -1.]), [[], [b'b']], [np.zeros(0), np.array([-1.])],
                         [np.zeros(0, int), np.array([7])])
    vocabulary = Vocabulary()
    assert [i.tolist() for i in unpack(pack(as_arrays(rows, vocabulary))).rows(vocabulary).top_ids] == [[], [7]]


def test_an_answer_of_no_tokens_with_ids():
    assert len(as_arrays(TokenLogprobs([], np.zeros(0), [], [], []), Vocabulary())) == 0


# One file


def test_text_and_then_logprobs_in_a_file_that_has_some(tmp_path):
    for i in range(2):
        with TeacherCache(tmp_path/'a.db') as cache:
            cache.put(ask(f'text {i}'), Completion('text'))
            rows = view([b'%d' % i, b'both'])
            cache.put(ask(i, 20), Completion('x', logprobs=rows))
            assert same(cache.get(ask(i, 20)).logprobs, rows)


def words_of(mine: int, i: int) -> TokenLogprobs:
    return view([b'%d %d' % (mine, i), b'both %d' % (i % 7), b' t%d' % i], 8, seed=mine*1000 + i)


def write_some(path, mine: int, n: int):
    with TeacherCache(path) as cache:
        for i in range(n):
            cache.put(ask(f'{mine} {i}', 8), Completion(f'{mine} {i}', logprobs=words_of(mine, i)))
            if i % 10 == 0: assert cache.get(ask(f'{mine} {i//2}', 8)).text == f'{mine} {i//2}'


def test_processes_and_threads_write_one_file_at_once(tmp_path):
    path, n = tmp_path/'a.db', 120
    with TeacherCache(path) as cache:
        jobs = [SPAWN.Process(target=write_some, args=(path, i, n)) for i in range(2)]
        jobs += [threading.Thread(target=write_some, args=(path, i, n)) for i in (2, 3)]
        for job in jobs: job.start()
        while any(job.is_alive() for job in jobs):
            for kept in cache.rows(): assert kept.completion.logprobs.tokens[0] == kept.completion.text.encode()
        for job in jobs: job.join()
        assert len(cache) == 4*n and cache.stats()['teachers'][0]['with_logprobs'] == 4*n
        assert all(same(cache.get(ask(f'{m} {i}', 8)).logprobs, words_of(m, i)) for m in range(4) for i in range(n))
    said = {t for m in range(4) for i in range(n) for row in words_of(m, i).top_tokens for t in row}
    with closing(sqlite3.connect(path)) as db:
        assert db.execute('select count(*), count(distinct bytes) from token').fetchone() == (len(said), len(said))


def test_an_answer_that_cannot_be_packed_harms_no_other(tmp_path):
    with TeacherCache(tmp_path/'a.db') as a, TeacherCache(tmp_path/'a.db') as b:
        a.put(ask(1, 2), Completion('x', logprobs=view([b'a', b'b'], 2)))
        odd = TokenLogprobs([b'new', b'newer'], np.zeros(5), [[b'q'], [b'r']], [np.zeros(1), np.zeros(1)])
        with pytest.raises(ValueError): a.put(ask(2, 2), Completion('x', logprobs=odd))
        b.put(ask(3, 2), Completion('x', logprobs=view([b'c', b'd'], 2)))
        a.put(ask(4, 2), Completion('x', logprobs=view([b'e', b'f'], 2)))
        for cache in (a, b):
            for i, words in ((1, [b'a', b'b']), (3, [b'c', b'd']), (4, [b'e', b'f'])):
                assert cache.get(ask(i, 2)).logprobs.tokens == words


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_a_cancelled_future_does_not_end_the_writer(tmp_path):
    cache = TeacherCache(tmp_path/'a.db')
    cache.put_later(ask(1), Completion('x')).cancel()
    assert cache.put_later(ask(2), Completion('y')).result(2)


def test_what_is_said_to_be_safe_is_in_the_file(tmp_path):
    with TeacherCache(tmp_path/'a.db') as cache, TeacherCache(tmp_path/'a.db') as other:
        waiting = [cache.put_later(ask(i), Completion('x')) for i in range(50)]
        for i, future in enumerate(waiting):
            future.result(5)
            assert ask(i) in other


def test_after_close_everything_says_so(tmp_path):
    cache = TeacherCache(tmp_path/'a.db')
    waiting = [cache.put_later(ask(i), Completion('x')) for i in range(300)]
    cache.close(); cache.close()
    assert all(f.done() and not f.exception() for f in waiting)
    for use in (lambda: cache.put(ask(1), Completion('x')), lambda: cache.get(ask(1)), lambda: len(cache),
                lambda: list(cache.rows()), cache.stats, cache.browse, lambda: cache.copy_to(tmp_path/'b.db')):
        with pytest.raises(CacheError, match='closed'): use()
    assert [p.name for p in tmp_path.iterdir()] == ['a.db']


def child(work, seconds: float = 10) -> int:
    "Run in a fork; gives its exit status, 99 where it hangs."
    pid = os.fork()
    if not pid:
        try: work()
        except BaseException: os._exit(1)
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 99


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_fork_reads_and_writes_and_its_end_harms_nobody(tmp_path):
    with TeacherCache(tmp_path/'a.db') as cache:
        cache.put(ask(1, 20), Completion('one', logprobs=view([b'one'])))
        def work():
            assert cache.get(ask(1, 20)).text == 'one' and cache.put(ask('child', 20),
                                                                    Completion('c', logprobs=view([b'c', b'd'])))
            cache.close()
        for _ in range(2): assert child(lambda: cache.get(ask(1)) and None) == 0
        assert child(work) == 0
        assert cache.put(ask(2, 20), Completion('two', logprobs=view([b'two', b'd'])))
        assert [cache.get(ask(i, 20)).logprobs.tokens for i in ('child', 2)] == [[b'c', b'd'], [b'two', b'd']]
    with TeacherCache(tmp_path/'a.db') as cache: assert len(cache) == 3


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_fork_while_another_thread_has_its_turn(tmp_path):
    with TeacherCache(tmp_path/'a.db') as cache:
        def has_its_turn():
            with cache._lock: time.sleep(1)
        thread = threading.Thread(target=has_its_turn)
        thread.start()
        time.sleep(.1)
        status = child(lambda: len(cache), seconds=20)  # it inherits the lock, taken by a thread that it does not have
        thread.join()
        assert status == 0


def test_a_pickle_is_the_same_file(tmp_path):
    with TeacherCache(tmp_path/'a.db', durability='full') as cache, pickle.loads(pickle.dumps(cache)) as twin:
        twin.put(ask(1), Completion('x'))
        assert ask(1) in cache and twin.durability == 'full'


# Files that are not to be touched


def sound(path, n: int = 40) -> bytes:
    with TeacherCache(path) as cache:
        for i in range(n): cache.put_later(ask(i, 20), Completion('x'*200, logprobs=view([b'%d' % i, b'y'])))
    return path.read_bytes()


def test_what_is_no_cache_is_refused_and_left(tmp_path):
    for name, data in {'text': b'Dear diary', 'zeros': bytes(5000), 'half a head': b'SQLite format 3\0' + bytes(20),
                       'head': b'SQLite format 3\0', 'json': b'[1]'}.items():
        (tmp_path/name).write_bytes(data)
        refused_untouched(tmp_path/name)
    with closing(sqlite3.connect(tmp_path/'other.db')) as db, db: db.execute('create table answer (key blob)')
    refused_untouched(tmp_path/'other.db', 'another program')
    for path in (tmp_path, tmp_path/'text'/'a.db'):
        with pytest.raises(CacheError): TeacherCache(path)


def test_a_later_format_is_refused_and_left(tmp_path):
    sound(tmp_path/'a.db')
    with closing(sqlite3.connect(tmp_path/'a.db')) as db: db.execute('pragma user_version=99')
    refused_untouched(tmp_path/'a.db', 'of format 99.*upgrade')


@pytest.mark.parametrize('share', [.02, .3, .5, .9, .999])
def test_a_truncated_file_is_refused_and_left(tmp_path, share):
    data = sound(tmp_path/'a.db')
    (tmp_path/'a.db').write_bytes(data[:int(len(data)*share)])
    refused_untouched(tmp_path/'a.db')


def test_no_damage_comes_back_as_another_error(tmp_path):
    data, rng = sound(tmp_path/'a.db'), random.Random(2)
    for i in range(40):
        bad, path = bytearray(data), tmp_path/f'{i}.db'
        for _ in range(rng.choice([1, 3, 400])): bad[rng.randrange(16, len(bad))] = rng.randrange(256)
        path.write_bytes(bad)
        try:
            with TeacherCache(path) as cache:
                list(cache.rows()); cache.stats(); f'{cache.browse()}'
        except CacheError: continue
        finally:
            for end in ('-wal', '-shm'): (tmp_path/f'{i}.db{end}').unlink(missing_ok=True)


def old_cache(path, n: int = 3, **over):
    "As the first release wrote it."
    rows = view([b'old', '日'.encode()[:2]], 3)
    head = json.dumps({'tokens': [t.decode('latin-1') for t in rows.tokens],
                       'top': [[t.decode('latin-1') for t in row] for row in rows.top_tokens]}).encode()
    numbers = np.concatenate([rows.logprobs, *rows.top_logprobs]).astype('<f2').tobytes()
    reply = {'text': '日', 'finish_reason': 'stop', 'usage': asdict(Usage(1, 2)), 'model': 'm', 'reasoning': None,
             'latency_s': .5, 'request_id': None}
    blob = zlib.compress(len(head).to_bytes(4, 'little') + head + numbers)
    def line(i):
        q = ask(i, 3, i % 2)
        return q.key, 'here', json.dumps(q.request), i % 2, json.dumps(reply), blob if i % 3 else None, 1. + i
    lines = [tuple((dict(zip('abcdefg', line(i))) | (over if i == n - 1 else {})).values()) for i in range(n)]
    with closing(sqlite3.connect(path)) as db, db:
        db.execute('create table answer (key blob primary key, endpoint text not null, request text not null, '
                   'sample integer not null, reply text not null, logprobs blob, created real not null)')
        db.executemany('insert into answer values (?,?,?,?,?,?,?)', lines)
        for mark in (f'application_id={OURS}', 'user_version=1'): db.execute(f'pragma {mark}')
    return rows


def check_migrated(path, rows, n):
    with TeacherCache(path) as cache:
        assert len(cache) == n
        for i in range(0, n, max(1, n//50)):
            said = cache.get(ask(i, 3, i % 2))
            assert said.text == '日' and (not i % 3 or same(said.logprobs, rows))


def test_the_first_format_is_taken_over(tmp_path):
    check_migrated(tmp_path/'a.db', old_cache(tmp_path/'a.db', 30), 30)


def test_a_kill_within_the_move_to_a_new_format_loses_nothing(tmp_path):
    n, rng, cut = 4000, random.Random(0), 0
    rows = old_cache(tmp_path/'whole.db', n)
    code = 'import sys, llm_distill as d; print("go", flush=True); d.TeacherCache(sys.argv[1])'
    for i in range(5):
        path = tmp_path/f'{i}.db'
        path.write_bytes((tmp_path/'whole.db').read_bytes())
        worker = subprocess.Popen([sys.executable, '-c', code, path], stdout=subprocess.PIPE)
        worker.stdout.readline()
        time.sleep(rng.uniform(.02, .5))
        worker.kill()
        worker.wait()
        worker.stdout.close()
        cut += worker.returncode == -signal.SIGKILL
        check_migrated(path, rows, n)
    assert cut >= 2


@pytest.mark.parametrize('over', [{'e': '{oops'}, {'e': '{}'}, {'f': b'oops'}, {'c': '7'}], ids=str)
def test_an_old_file_that_cannot_be_read_is_refused(tmp_path, over):
    old_cache(tmp_path/'a.db', **over)
    with pytest.raises(CacheError): TeacherCache(tmp_path/'a.db')


@pytest.mark.parametrize('over', [{'e': '{oops'}, {'f': b'oops'}], ids=str)
def test_after_a_move_that_failed_the_old_answers_are_there(tmp_path, over):
    old_cache(tmp_path/'a.db', **over)
    for _ in range(2):
        with pytest.raises(Exception): TeacherCache(tmp_path/'a.db')  # noqa: B017
    with closing(sqlite3.connect(tmp_path/'a.db')) as db:
        assert db.execute('select count(*) from answer').fetchone() == (3,)
        assert db.execute('pragma user_version').fetchone() == (1,)


@pytest.mark.parametrize('kind, journal', [
    ('ext4', 'wal'), ('apfs', 'wal'), ('nfs4', 'delete'), ('lustre', 'delete'), ('fuse.drive', None), ('davfs', None)])
def test_network_drives_are_known(tmp_path, kind, journal):
    mounts = f'/dev/a / ext4 rw 0 0\nother:/x {tmp_path} {kind} rw 0 0'
    assert drive_of(tmp_path/'a.db', mounts) == (kind, str(tmp_path))
    if journal: assert check_drive(tmp_path/'a.db', mounts) == journal
    else:
        with pytest.raises(CacheError, match='copy_to'): check_drive(tmp_path/'a.db', mounts)


def test_a_link_to_a_network_drive_is_one(tmp_path):
    (tmp_path/'drive').mkdir()
    (tmp_path/'link').symlink_to(tmp_path/'drive')
    with pytest.raises(CacheError):
        check_drive(tmp_path/'link'/'a.db', f'/dev/a / ext4 rw 0 0\nx {tmp_path}/drive fuse.drive rw 0 0')


# Copies


def test_copies_and_merges(tmp_path):
    with TeacherCache(tmp_path/'a.db') as a, TeacherCache(tmp_path/'b.db') as b:
        for i in range(30): (a if i % 3 else b).put_later(ask(i, 20), Completion(f'{i}', logprobs=view([b'%d' % i])))
        a.put(ask('b too'), Completion('a')); b.put(ask('b too'), Completion('b'))
        copy = a.copy_to(tmp_path/'far'/'copy.db')
        assert copy.read_bytes()[18:20] == b'\x01\x01', 'no WAL on a network drive'
        new = b.merge(copy)
        assert new == len(a) - 1 and b.merge(a) == 0 == b.merge(b) and len(b) == 31
        assert b.get(ask('b too')).text == 'b'
        assert all(b.get(ask(i, 20)).logprobs.tokens == [b'%d' % i] for i in range(30))
        with pytest.raises(CacheError, match='no cache'): b.merge(tmp_path/'nowhere.db')


def test_a_copy_onto_itself_is_refused(tmp_path):
    with TeacherCache(tmp_path/'a.db') as cache:
        cache.put(ask(1), Completion('x'))
        with pytest.raises((CacheError, BadInput)): cache.copy_to(tmp_path/'a.db')


# Looking


def test_the_browser_shows_odd_answers_and_runs_none(tmp_path):
    bad = '<script>alert(1)</script>"\'><img src=x onerror=alert(2)>'
    odd = TokenLogprobs([b'<b>', b'\xff\xfe', b'', b'\xe6', b'\x97\xa5'], np.array([np.nan, -np.inf, 0., -9999., -.1]),
                        [[b'<i>'], [], [b'\x00'], [b'"'], [bad.encode()]],
                        [np.array([x]) for x in (np.nan,)] + [np.zeros(0)] + [np.array([-1.])]*3)
    with TeacherCache(tmp_path/'a.db') as cache:
        said = dict(text=bad, finish_reason=bad, model=bad, reasoning=bad, request_id=bad)
        cache.put(Query(bad, {'model': bad, 'messages': [{'role': bad, 'content': bad}], 'logprobs': 1}),
                  Completion(**said, logprobs=odd))
        cache.put(ask('Ä große Straße', 0), Completion('\ud83d half \x00 \x1b[31m \u202e', None, latency_s=-1.))
        cache.put(Query('here', {'model': 'rest', 'question': 'nobody knows where'}), Completion('rest'))
        cache.put(ask('cut'), Completion('', 'length'), aside=True)
        page, text = cache.browse()._repr_html_(), f'{cache.browse()}'
        assert '<script>alert' not in page and '<img' not in page and '\x1b' not in page + text
        assert len(cache.browse('STRASSE')) == 1 and len(cache.browse('onerror')) == 1 and not cache.browse('absent')
        assert len(cache.browse(limit=1)) == 1 and cache.browse(limit=1).total == 3
        assert '<script>alert' not in cache.browse(bad).save(tmp_path/'a.html').read_text()
        assert json.dumps(cache.stats())
        with pytest.raises(BadInput): cache.browse(limit=0)


def test_the_browser_shows_questions_in_parts(tmp_path):
    parts = [{'type': 'text', 'text': 'What is this?'}]
    with TeacherCache(tmp_path/'a.db') as cache:
        cache.put(Query('here', {'model': 'm', 'messages': [{'role': 'user', 'content': parts}]}), Completion('x'))
        assert 'What is this?' in cache.browse()._repr_html_()
