"Make the pictures of the panels in nbs/images: python tests/screenshots.py [--out DIR] [--width 1000] [--dark]"
import argparse
import io
import tempfile
from pathlib import Path

from browser import browser, lab, missing, run_notebook, write_notebook
from test_jupyterlab import Hand

ROOT = Path(__file__).resolve().parent.parent
QUESTION = 'Why do leaves change colour in autumn?'


def save(locator, place: Path, height: int|None = None):
    "A small PNG: 128 colours are enough for a page."
    from PIL import Image
    picture = Image.open(io.BytesIO(locator.screenshot())).convert('RGB')
    if height: picture = picture.crop((0, 0, picture.width, min(height, picture.height)))
    picture.quantize(128, dither=Image.Dither.NONE).save(place, optimize=True)
    print(f'{place.name}: {picture.width} x {picture.height}, {place.stat().st_size/1000:.0f} kB', flush=True)
    assert place.stat().st_size < 150_000


def work(page, out: Path):
    "Use all panels, with SmolLM2 as the teacher, and take their pictures."
    def take(name, height=None):
        page.wait_for_timeout(700)
        save(page.locator(f'.ld-{name}'), out/f'panel_{name}.png', height)
    page.locator('.ld-studio').wait_for(timeout=90_000)
    hand = Hand(page, 'teacher', 'Teacher')
    hand.fill('Test question', QUESTION)
    hand.press('Ask', 'answered in', 300)
    hand.press('Probe', 'Probed with', 300)
    take('teacher')

    hand = Hand(page, 'collect', 'Collect')
    hand.choose('Prompts from', 'Data set')
    hand.fill('First so many', 48)
    hand.fill('Longest answer', 40)
    hand.press('Start', '48 answers are there', 900)
    hand.panel.locator('details.row > summary').nth(1).click()
    page.evaluate("document.querySelectorAll('.ld-collect details.row').forEach((r, i) => { if (i > 4) r.remove() })")
    take('collect')

    hand = Hand(page, 'distill', 'Distil')
    for name, rate in (('run-1', 5e-4), ('run-2', 1e-3)):
        hand.fill('Run', name)
        hand.choose('Take', '1 layer in 2 of it')
        hand.fill('Learning rate', rate)
        hand.fill('Steps', 60)
        hand.fill('Batch', 8)
        hand.fill('Held out', .15)
        hand.fill('Samples every', 20)
        hand.press('Start', f'The student is in .*{name}', 900)
    hand.choose('Lay another run over', 'run-1')
    take('distill')

    hand = Hand(page, 'evaluate', 'Evaluate')
    hand.fill('Held out', .15)
    hand.fill('Answers to read', 3)
    hand.press('Evaluate', 'Judged on', 300)
    hand.press('B is better')
    take('evaluate')

    hand = Hand(page, 'chat', 'Chat')
    hand.fill('Question', QUESTION)
    hand.fill('Longest answer', 64)
    hand.press('Ask', '2 of 2 answered', 300)
    take('chat')

    hand = Hand(page, 'serve', 'Serve')
    hand.press('Start', 'Serving .* at http', 300)
    url = hand.panel.locator('a code').inner_text()
    chat = Hand(page, 'chat', 'Chat')
    chat.fill('First model', url)
    chat.fill('Second model', '')
    chat.press('Ask', '1 of 1 answered', 300)
    hand = Hand(page, 'serve', 'Serve')
    page.wait_for_timeout(2500)
    take('serve')
    hand.press('Stop', 'has stopped')

    hand = Hand(page, 'jobs', 'Jobs')
    hand.press('Start a service here', 'looking every')
    hand.fill('Steps', 400)
    hand.press('New job', 'is (running|pending|queued)')
    hand.panel.locator('img').first.wait_for(timeout=600_000)
    page.wait_for_timeout(15_000)
    take('jobs')
    hand.press('Cancel job', 'is told to end')
    hand.panel.get_by_role('cell', name='■ cancelled').wait_for(timeout=60_000)

    Hand(page, 'chat', 'Chat')
    page.get_by_role('tab', name='Distil', exact=True).click()
    take('studio', 1240)  # the upper part: for the README


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=ROOT/'nbs/images')
    parser.add_argument('--width', type=int, default=1000)
    parser.add_argument('--dark', action='store_true')
    args = parser.parse_args()
    if why := missing(): raise SystemExit(why)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        folder = Path(folder)
        (folder/'root').mkdir()
        write_notebook(folder/'root/studio.ipynb', "from llm_distill.panels import Studio\n\nStudio('project')")
        with lab(folder, folder/'root', args.dark) as url, browser(folder, args.width, 2600) as page:
            run_notebook(page, url, 'studio.ipynb')
            work(page, args.out)


if __name__ == '__main__': main()
