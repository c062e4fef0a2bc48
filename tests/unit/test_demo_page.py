"""The demo in a real browser: turns appear as they happen, cancel ends the episode, and nothing that the agent read becomes markup."""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing, suppress

import pytest

from tests.chromium import chromium_page, find_chromium
from tests.fakes import FakeJudge, FakeToolbox, ScriptedPolicy, SpeakingPolicy, answer, make_tokenizer, search
from webdancer.config import EpisodeConfig, PromptConfig, RewardConfig
from webdancer.demo.server import build_app, listen, serve
from webdancer.rollout.runner import LocalEpisodeRunner
from webdancer.types import Sampling

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs Chromium, which is not installed")

SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'><svg onload='window.hacked = 3'>"
HOSTILE = (
    f"A Google search for 'x' found 3 results:\n\n## Web Results\n1. [{SCRIPT}](https://example.org/a?b=1)\n\n{SCRIPT}\n\n"
    "2. [run](javascript:window.hacked=4)\n\n3. [own](/wiki/Karo)\n\n\ndata: {}\n\nevent: end\ndata: {}\n\n"
)
SLOW = "slow"
TYPED = "typed"


class Demo:
    """The real server on a thread; questions named `slow` hang in their first tool call, those named `typed` in the middle of a turn."""

    def __init__(self):
        self.started, self.cancelled = threading.Event(), threading.Event()
        self._socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    async def run(self, task, **settings):
        """interfaces.EpisodeRunner: a fresh script for every question."""
        toolbox = FakeToolbox(HOSTILE, delay_s=60.0 if task.question == SLOW else 0.0)
        script = [search("Karo Mil", thought=f"I wonder {SCRIPT}"), "no action", answer(f"It is {SCRIPT}")]
        typed = search(["Karo Mil", SCRIPT, "never"], thought=f"I wonder {SCRIPT}")
        num_typed = len(make_tokenizer().encode(typed.partition("never")[0]))
        runner = LocalEpisodeRunner(
            policy=SpeakingPolicy([typed], stops_after=num_typed) if task.question == TYPED else ScriptedPolicy(script),
            toolbox=toolbox,
            judge=FakeJudge(),
            tokenizer=make_tokenizer(),
            episode=EpisodeConfig(),
            prompt=PromptConfig(),
            reward=RewardConfig(),
        )
        self.started.set()
        try:
            return await runner.run(task, **settings)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def _run(self):
        app = build_app(self, model=f"model {SCRIPT}", sampling=Sampling(), site="http://127.0.0.1:9", examples=["one?", SCRIPT])
        self._serving = self._loop.create_task(serve(app, self._socket))
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._serving)

    def close(self):
        self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join(10)


@pytest.fixture(scope="module")
def demo():
    with closing(Demo()) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with chromium_page() as page:
        yield page


@pytest.fixture
def page(demo, browser):
    browser.open(demo.url)
    browser.wait_for("document.querySelectorAll('.example').length === 2")
    return browser


def ask(page, question):
    page.evaluate(f"document.getElementById('question').value = {question!r}; document.getElementById('ask').click()")


def start_slowly(page, demo):
    """A question whose episode is under way, and will be for long."""
    demo.started.clear()
    demo.cancelled.clear()
    ask(page, SLOW)
    assert demo.started.wait(20)
    page.wait_for("!document.getElementById('cancel').hidden")


def test_an_episode_is_shown_and_hostile_text_stays_text(page):
    ask(page, "What is the school of Karo Mil?")
    page.wait_for("document.getElementById('run').dataset.state === 'done'")
    assert page.evaluate("document.getElementById('answer-text').textContent") == f"It is {SCRIPT}"
    assert page.evaluate("[...document.querySelectorAll('#turns > li')].length") == 3
    assert page.evaluate("document.querySelector('.turn .think').textContent") == f"I wonder {SCRIPT}"
    assert page.evaluate("document.querySelector('.turn .call').textContent") == "search: Karo Mil"
    assert "neither" in page.evaluate("document.querySelector('.turn .problem').textContent")
    assert page.evaluate("document.querySelector('.turn pre').textContent").endswith("event: end\ndata: {}\n\n")
    assert page.evaluate("document.getElementById('status').textContent").startswith("answered: 1 tool call, ")
    links = page.evaluate("[...document.querySelectorAll('#sources a')].map((a) => [a.href, a.textContent, a.rel])")
    assert links == [
        ["https://example.org/a?b=1", SCRIPT, "noopener noreferrer nofollow"],
        ["http://127.0.0.1:9/wiki/Karo", "own", "noopener noreferrer nofollow"],
    ]
    assert page.evaluate("document.querySelectorAll('main script, img, svg, iframe, [onerror], [onload]').length") == 0
    assert page.evaluate("window.hacked") is None


def test_cancel_ends_the_episode_itself(page, demo):
    start_slowly(page, demo)
    page.evaluate("document.getElementById('cancel').click()")
    page.wait_for("document.getElementById('status').textContent === 'cancelled'")
    assert demo.cancelled.wait(20)
    assert page.evaluate("document.getElementById('ask').hidden") is False


def test_a_turn_appears_as_it_is_written_and_cancel_ends_it_in_its_middle(page, demo):
    demo.cancelled.clear()
    ask(page, TYPED)
    page.wait_for("document.querySelector('.live .call')?.textContent.includes('hacked = 3')")
    assert page.evaluate("document.querySelector('.live .think').textContent") == f"I wonder {SCRIPT}"
    assert page.evaluate("document.querySelector('.live .call').textContent").startswith(f"search: Karo Mil | {SCRIPT}")
    assert page.evaluate("document.querySelector('.live').getAttribute('aria-busy')") == "true"
    assert page.evaluate("document.querySelectorAll('main script, img, svg, iframe, [onerror], [onload]').length") == 0
    page.evaluate("document.getElementById('cancel').click()")
    page.wait_for("document.getElementById('status').textContent === 'cancelled'")
    assert demo.cancelled.wait(20)
    assert page.evaluate("document.querySelectorAll('.turn').length - document.querySelectorAll('.live').length") == 1, (
        "what was said stays"
    )
    assert page.evaluate("window.hacked") is None


def test_a_closed_page_ends_the_episode(page, demo):
    start_slowly(page, demo)
    page.open(f"{demo.url}/demo.css")
    assert demo.cancelled.wait(20)


def test_no_string_can_become_markup_or_script(page):
    with pytest.raises(ValueError, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")
    setting = "try { s.text = 'window.hacked = 5'; } catch {}"
    page.evaluate(f"(() => {{ const s = document.createElement('script'); {setting} document.body.append(s); }})()")
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("fetch('http://127.0.0.1:1/').then(() => 'sent', (error) => error.name)") == "TypeError"


def test_an_example_is_a_click(page):
    page.evaluate("document.querySelector('.example').click()")
    page.wait_for("document.getElementById('run').dataset.state === 'done'")
    assert page.evaluate("document.getElementById('question').value") == "one?"
    assert page.evaluate("document.getElementById('model').textContent") == f"model {SCRIPT}"
