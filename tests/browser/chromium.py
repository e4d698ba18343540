"""Control a headless Chromium over its debugging pipe, without a driver, library or port."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')


def find() -> str | None:
    """Return the path of Chromium, or None."""
    return os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page. Messages are JSON objects, each followed by a zero byte."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from = to_browser, from_browser
        self._rest, self._sent, self._session = b'', 0, None
        self.events: list[dict[str, Any]] = []
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        attached = self.call('Target.attachToTarget', targetId=target, flatten=True)
        self._session = attached['sessionId']
        for domain in ('Page', 'Network', 'Runtime', 'Log'):
            self.call(f'{domain}.enable')

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its answer; events in between are appended to `events`."""
        self._sent += 1
        message = {'id': self._sent, 'method': method, 'params': params}
        if self._session:
            message['sessionId'] = self._session
        os.write(self._to, json.dumps(message).encode() + b'\0')
        while (answer := self._read()).get('id') != self._sent:
            self.events.append(answer)
        if 'error' in answer:
            raise RuntimeError(f'{method}: {answer["error"]["message"]}')
        return answer['result']

    def _read(self) -> dict[str, Any]:
        while b'\0' not in self._rest:
            part = os.read(self._from, 2**16)
            if not part:
                raise RuntimeError('Chromium has ended.')
            self._rest += part
        message, _, self._rest = self._rest.partition(b'\0')
        return json.loads(message)

    def open(self, path: Path, width_px: int, scheme: str) -> None:
        """A file, on a screen of that width, for a reader who likes 'light' or 'dark'."""
        phone = width_px < 600
        size = {'width': width_px, 'height': 844, 'deviceScaleFactor': 1}
        self.call('Emulation.setDeviceMetricsOverride', **size, mobile=phone)
        features = [{'name': 'prefers-color-scheme', 'value': scheme}]
        self.call('Emulation.setEmulatedMedia', features=features)
        self.events.clear()
        self.call('Page.navigate', url=path.resolve().as_uri())
        while not any(event['method'] == 'Page.loadEventFired' for event in self.events):
            self.events.append(self._read())

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression (the debugger's; the page itself runs none)."""
        answer = self.call('Runtime.evaluate', expression=expression, returnByValue=True)
        if 'exceptionDetails' in answer:
            raise RuntimeError(f'{expression}: {answer["exceptionDetails"]["text"]}')
        return answer['result'].get('value')  # JavaScript's undefined has none

    def screenshot(self) -> bytes:
        """Return the complete page as PNG."""
        shot = self.call('Page.captureScreenshot', captureBeyondViewport=True)
        return base64.b64decode(shot['data'])

    def requests(self) -> list[str]:
        """The addresses that the page asked for since it was opened."""
        return [
            event['params']['request']['url']
            for event in self.events
            if event['method'] == 'Network.requestWillBeSent'
        ]

    def warnings(self) -> list[str]:
        """Return the browser's warnings about the page: refused styles, broken images."""
        return [
            event['params']['entry']['text']
            for event in self.events
            if event['method'] == 'Log.entryAdded'
        ]


@contextlib.contextmanager
def start(chromium: str) -> Generator[Page]:
    """Start a browser with an empty profile; end it with the block."""
    their_in, to_browser = os.pipe()
    from_browser, their_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ['--headless', '--remote-debugging-pipe', f'--user-data-dir={profile}']
        flags += ['--no-first-run', '--disable-gpu', '--disable-dev-shm-usage']
        flags += ['--no-sandbox'] if os.geteuid() == 0 else []  # root cannot use the sandbox
        browser = subprocess.Popen(
            # Chromium expects the pipes at 3 and 4. Bash puts them there: Python would need a
            # fork, which JAX's threads forbid. 8 and 9 serve as intermediates.
            [
                'bash',
                '-c',
                f'exec 8<&{their_in} 9>&{their_out}; exec "$0" "$@" 3<&8 4>&9',
                chromium,
                *flags,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(their_in, their_out),
        )
        os.close(their_in)
        os.close(their_out)
        try:
            yield Page(to_browser, from_browser)
        finally:
            browser.kill()
            browser.wait()
            os.close(to_browser)
            os.close(from_browser)
