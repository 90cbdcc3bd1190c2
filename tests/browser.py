"JupyterLab and Voila in a headless Chromium, for tests and pictures of panels."
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

FLAGS = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update', '--force-color-profile=srgb']
TOKEN = 'panels'


def missing() -> str|None:
    "Why there is no browser; None where there is one."
    try: import playwright  # noqa: F401
    except ImportError: return 'playwright is not installed: pip install playwright'
    return None if chromium() else 'no chromium found: apt-get install chromium'


def chromium() -> str|None:
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _environment(folder: Path) -> dict:
    names = ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR', 'JUPYTERLAB_SETTINGS_DIR',
             'JUPYTERLAB_WORKSPACES_DIR')
    return os.environ | {name: str(folder/name.lower()) for name in names} | {'OMP_NUM_THREADS': '1'}


@contextmanager
def running(command, folder: Path, url: str, root: Path):
    "A server in a group of its own, up when `url` answers; all of the group ends with it."
    with (folder/'server.log').open('w') as log:
        process = subprocess.Popen(command, env=_environment(folder), stdout=log, stderr=log, start_new_session=True,
                                   cwd=root)
    try:
        for _ in range(600):
            try: urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60).close(); break
            except urllib.error.HTTPError: break  # it is up, if not of our mind
            except OSError: pass
            assert process.poll() is None, (folder/'server.log').read_text()[-3000:]
            time.sleep(.1)
        else: raise AssertionError((folder/'server.log').read_text()[-3000:])
        yield
    finally:
        with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGTERM)
        try: process.wait(10)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def lab(folder: Path, root: Path, dark: bool = False):
    "JupyterLab over `root`; gives its address."
    port = free_port()
    settings = folder/'jupyterlab_settings_dir/@jupyterlab/apputils-extension'
    settings.mkdir(parents=True)
    (settings/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
    if dark: (settings/'themes.jupyterlab-settings').write_text('{"theme": "JupyterLab Dark"}')
    command = [sys.executable, '-m', 'jupyter', 'lab', '--no-browser', '--ip=127.0.0.1', f'--port={port}',
               f'--IdentityProvider.token={TOKEN}', f'--ServerApp.root_dir={root}', '--ServerApp.port_retries=0',
               '--allow-root', '--LabApp.expose_app_in_browser=True']
    url = f'http://127.0.0.1:{port}'
    with running(command, folder, f'{url}/api/status?token={TOKEN}', root): yield url


@contextmanager
def classic(folder: Path, root: Path, python: Path):
    "Classic Notebook over `root`, in an environment with nbclassic and ipywidgets 7; gives its address."
    port = free_port()
    settings = folder/'jupyter_config_dir/serverconfig'
    settings.mkdir(parents=True)
    (settings/'notebook.json').write_text('{"load_extensions": {"jupyter-js-widgets/extension": true}}')
    command = [python, '-m', 'nbclassic', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--allow-root',
               f'--IdentityProvider.token={TOKEN}', f'--ServerApp.root_dir={root}', '--ServerApp.port_retries=0']
    url = f'http://127.0.0.1:{port}'
    with running(command, folder, f'{url}/api/status?token={TOKEN}', root): yield url


@contextmanager
def browser(folder: Path, width: int = 1000, height: int = 1400):
    "A page."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            str(folder/'browser'), executable_path=chromium(), args=FLAGS, viewport={'width': width, 'height': height})
        context.set_default_timeout(30_000)
        yield context.pages[0] if context.pages else context.new_page()
        context.close()


def run_notebook(page, url: str, name: str) -> None:
    "Open a notebook in JupyterLab and run all of it."
    page.goto(f'{url}/doc/tree/{name}?reset&token={TOKEN}')
    page.wait_for_function('window.jupyterapp && window.jupyterapp.shell && window.jupyterapp.shell.currentWidget'
                           ' && window.jupyterapp.shell.currentWidget.sessionContext')
    page.evaluate('''async () => { const s = window.jupyterapp.shell.currentWidget.sessionContext
        await s.ready; await s.session.kernel.info }''')
    page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }")


def run_classic(page, url: str, name: str) -> None:
    "Open a notebook in classic Notebook and run all of it, once there is somebody to draw its widgets."
    page.goto(f'{url}/nbclassic/notebooks/{name}?token={TOKEN}')
    page.wait_for_function("""() => { const k = window.Jupyter && Jupyter.notebook && Jupyter.notebook.kernel
        return !!(k && k.info_reply.protocol_version && k.comm_manager.targets['jupyter.widget']) }""")
    page.evaluate('() => { Jupyter.notebook.execute_all_cells() }')


def write_notebook(path: Path, *cells: str) -> Path:
    "A notebook of code cells."
    code = [{'cell_type': 'code', 'id': f'cell-{i}', 'metadata': {}, 'source': c, 'outputs': [],
             'execution_count': None} for i, c in enumerate(cells)]
    kernel = {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
    path.write_text(json.dumps({'cells': code, 'metadata': {'kernelspec': kernel}, 'nbformat': 4, 'nbformat_minor': 5}))
    return path
