"""One transcription over as many sessions as necessary: resume, rollover, watchdog.

                 ready
    CONNECTING --------> LISTENING --------------------------> DONE
        ^  ^                 |    |    input ended, `done` came
        |  |  pause after a minute,
        |  |  limit near, blanks, stall, audio lost from the buffer
        |  +-----------------+    |
        |                         |  connection lost, server error
        |      after a wait       v
        +--------------------- WAITING ----> GaveUp  (nothing new transcribed for `give_up_after` s)
                                             Refused (trying again is useless)

Every arrow into CONNECTING continues from the commit point of the `Timeline`: audio from there on is sent again, and
the first answer replaces the partial words after it. A word is yielded once, when it is final.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing

from .errors import GaveUp, SessionLost
from .protocol import FRAME, PROMPT_RESERVE, RATE
from .session import Done, Server, Session
from .timeline import WORDLESS_SECONDS, Timeline, Word

AHEAD = 5 * RATE  # audio in flight to the server: enough to keep it busy, little to send again
PIECE = RATE // 4  # most audio in one message
ROLLOVER_SECONDS = 75.0  # on a stock server a frame costs more with every frame before it (docs/performance.md)
FLAT_ROLLOVER_SECONDS = 300.0  # where it does not: eight sessions of that length fit on 12 GB
STALL_SECONDS = 20.0  # a loaded server answers within 1 s; a first request may compile for longer
BLANKS_SECONDS = 20.0  # sound without a word: nobody speaks one of the model's languages for so long without one
BLANKS_MAX_SECONDS = 80.0  # music and noise are confirmed less and less often; three times this must fit KEEP
KEEP_SECONDS = 300.0  # live audio kept through an outage: 9.6 MB
GIVE_UP_SECONDS = 120.0  # a server restart takes a minute, a first start up to three
MAX_DELAY = 3 * RATE  # a model with the longest delay (2.4 s) receives this much audio before its first delta
FLUSH = RATE // 4  # `done` is complete if the deltas reach this far beyond the input (the server adds 0.8 s)


class Transcriber:
    """Yields the words of an audio stream with their times, whatever happens to its sessions.

        transcriber = Transcriber(server)
        await transcriber.open()
        async for word in transcriber.words(chunks): ...

    `live`: the audio comes at its own pace and cannot wait (a microphone).
    `notify(state, message)` is called for every change. States: those in the module's docstring, and AUDIO_LOST.
    `missing`: spans (start, end) of the input, in seconds, that were never transcribed. `sessions`: how many the server
    has granted.
    """

    def __init__(
        self,
        server: Server,
        *,
        model: str | None = None,
        live: bool = False,
        notify: Callable[[str, str], None] = lambda state, message: None,
        give_up_after: float = GIVE_UP_SECONDS,
        numbers: Iterator[int] | None = None,
        impatient: bool = False,
    ):
        """`server`: a Server, or what has its `model` and `session`. `model`: its name, by default the server's first.

        `give_up_after`: longest time without progress in seconds; waiting for a session of a busy server is not
        counted. `numbers`: source of the sessions' numbers. `impatient`: raise SessionLost, in place of waiting, where
        the server refuses the first session because it is busy.
        """
        self._timeline = Timeline(numbers)
        self.sessions = self.completion_tokens = 0
        self.missing: list[tuple[float, float]] = []
        self._server, self._model, self._live, self._notify = server, model, live, notify
        self._give_up_after, self._impatient = give_up_after, impatient
        self._session_limit = self._rollover_after = 0.0  # seconds; at four rollovers a session ends without a pause
        self._blanks_limit = BLANKS_SECONDS
        self._prompt = 0  # tokens of a session's prompt, as the server counts them
        self._last_delta = 0.0  # time on the event loop's clock
        self._furthest = 0  # end of the audio that any session has transcribed
        self._progress, self._failures = 0.0, 0  # time of the last progress, failures since then
        self._sent = 0  # end of the audio sent to the current session
        self._ended = False  # no more audio comes
        self._more = asyncio.Event()  # audio or room for it has come

    async def open(self) -> None:
        """Ask the server for its model and limits. Raises Refused or SessionLost where it cannot be used."""
        self._notify("CONNECTING", "")
        model = await self._server.model(self._model)
        self._model, tokens = model["id"], model["max_model_len"]
        self._session_limit = max(tokens - PROMPT_RESERVE, tokens // 2) * FRAME / RATE if tokens else 2400.0
        longest = FLAT_ROLLOVER_SECONDS if model["voxtral_speed"] else ROLLOVER_SECONDS
        self._rollover_after = min(longest, self._session_limit / 2)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens in all prompts so far; 0 until the server has counted a session."""
        return self._prompt * self.sessions

    @property
    def received(self) -> float:
        """Seconds of audio received."""
        return self._timeline.received / RATE

    @property
    def transcribed(self) -> float:
        """End of the audio that the current session has transcribed, in seconds."""
        return self._timeline.transcribed / RATE

    @property
    def partial(self) -> list[Word]:
        """Words that may still change. At the end of a transcription that cannot go on they are its last words."""
        return self._timeline.partial

    @property
    def committed(self) -> float:
        """End of the audio whose words are final, in seconds. What was yielded is before it."""
        return self._timeline.committed / RATE

    @property
    def session(self) -> int:
        """Number of the session that transcribed the partial words."""
        return self._timeline.session

    def commit_wordless(self, seconds: float) -> None:
        """Make all words final, pause or not, where no word ended in the last `seconds`."""
        self._timeline.commit_wordless(seconds)

    @property
    def lag(self) -> float:
        """Seconds of audio received but not yet transcribed."""
        return max(0, self._timeline.received - self._timeline.transcribed) / RATE

    async def words(self, chunks: AsyncGenerator[bytes]) -> AsyncIterator[Word]:
        """Yield the words of `chunks` (PCM16 bytes, 16 kHz mono) as they become final. It closes `chunks`.

        Raises Refused or GaveUp, or SessionLost if impatient; all final words have been yielded by then, the others are
        in `partial`. Exceptions of `chunks` are raised after the words before them.
        """
        intake = asyncio.create_task(self._take_in(chunks))
        try:
            while await self._audio_there():
                trouble = None
                try:
                    async with aclosing(self._session()) as words:
                        async for word in words:
                            yield word
                except SessionLost as error:
                    trouble = error
                for word in self._timeline.take():
                    yield word
                if trouble is None:
                    self._notify("CONNECTING", "")
                else:
                    await self._wait_after(trouble)
            self._notify("DONE", "")
            await intake
        finally:
            intake.cancel()
            await asyncio.gather(intake, return_exceptions=True)

    async def _session(self) -> AsyncIterator[Word]:
        """Yield the words of one session. Raises Refused or SessionLost."""
        self._sent = self._timeline.begin()
        async with self._server.session(self._model) as session:
            self._notify("LISTENING", "")
            self._last_delta = asyncio.get_running_loop().time()
            if self._timeline.lead:
                await session.send(bytes(2 * self._timeline.lead))
            feeding = asyncio.create_task(self._feed(session))
            try:
                while await self._step(session):
                    if feeding.done():
                        feeding.result()  # raises an error in this program, which is not the server's
                    for word in self._timeline.take():
                        yield word
            finally:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)

    def _progressed(self) -> None:
        """Note that audio was transcribed for the first time, or that there is none to transcribe."""
        self._progress, self._failures = asyncio.get_running_loop().time(), 0

    async def _wait_after(self, trouble: SessionLost) -> None:
        """Wait until the next session may be asked for. Raises GaveUp, or `trouble` if impatient."""
        if trouble.busy:  # the server works: waiting for a slot is no failure
            if self._impatient and not self.sessions:
                raise trouble
            self._progressed()
            self._notify("WAITING", "all sessions of the server are taken: waiting for a free one")
            return await asyncio.sleep(random.uniform(1, 3))
        left = self._progress + self._give_up_after - asyncio.get_running_loop().time()
        if left <= 0:
            raise GaveUp(f"gave up after {self._give_up_after:.0f} s: {trouble}")
        self._notify("WAITING", f"{trouble}; trying again")
        self._failures += 1
        usual = min(8.0, 0.25 * 2**self._failures) * random.uniform(0.5, 1.5)
        await asyncio.sleep(min(max(usual, trouble.retry_after), left))

    async def _step(self, session: Session) -> bool:
        """Process the next delta; return False where a new session must continue. Raises Refused or SessionLost."""
        timeline, clock = self._timeline, asyncio.get_running_loop().time
        committed = timeline.committed
        try:
            async with asyncio.timeout(0.5):
                delta = await session.receive()
        except TimeoutError:
            delta = None
            # What is received but not sent counts too: a connection that is dead takes only what fits into its buffers.
            if timeline.received - timeline.transcribed < MAX_DELAY and not self._ended:
                self._last_delta = clock()  # the server has nothing to work on
                self._progressed()
            stalled = min(STALL_SECONDS, self._give_up_after)
            if clock() - self._last_delta > stalled:
                raise SessionLost(f"no answer for {stalled:g} s") from None
        if timeline.transcribed + timeline.lead < timeline.committed:
            return False  # the audio that it transcribes was dropped
        if delta is None:
            return True
        self._last_delta = clock()
        if isinstance(delta, Done):
            return self._finish(delta)
        self.sessions += timeline.session_length == 0  # a server that is busy says so in place of the first delta
        timeline.add_delta(delta)
        if timeline.transcribed > self._furthest:
            self._furthest = timeline.transcribed
            self._progressed()
        self.completion_tokens += 1
        self._more.set()
        return not self._needs_new_session(delta, committed)

    def _needs_new_session(self, delta: str, committed_before: int) -> bool:
        """Is it time for a rollover, or has the model been blank for too long? Commits where there is no pause."""
        timeline = self._timeline
        age = timeline.session_length / RATE
        if age > self._session_limit:
            timeline.commit_between_words()
            return True
        if self._ended and self._sent >= timeline.received:
            return False  # only a few frames are left
        if age > self._rollover_after and timeline.committed > committed_before:
            return True
        if age > 4 * self._rollover_after:  # speech without a pause, or with music
            timeline.commit_between_words()
            return True
        self._blanks_limit = BLANKS_SECONDS if delta else self._blanks_limit
        wordless_sound = timeline.wordless_sound()
        if wordless_sound > self._blanks_limit or (
            timeline.wordless() > 3 * self._blanks_limit and wordless_sound > WORDLESS_SECONDS
        ):
            self._notify("CONNECTING", f"no words in {wordless_sound:.0f} s of sound: asking a new session")
            self._blanks_limit = min(2 * self._blanks_limit, BLANKS_MAX_SECONDS)
            timeline.suspect_blanks()
            return True
        return False

    def _finish(self, done: Done) -> bool:
        """Process the end of a session that the server ended. Returns False. Raises SessionLost."""
        if self._timeline.session_length == 0:
            raise SessionLost("the server ended the session without a word")
        self._prompt = done.prompt_tokens
        if self._ended and self._timeline.transcribed >= self._timeline.received + FLUSH:
            self._timeline.finish()
        else:
            committed = self._timeline.committed
            self._timeline.commit_between_words()  # the server's limit came first
            if self._timeline.committed == committed:
                raise SessionLost("the server ended the session before any word was final")
        return False

    async def _take_in(self, chunks: AsyncGenerator[bytes]) -> None:
        """Add the audio to the timeline, that of a file no faster than the server transcribes it."""
        try:
            async with aclosing(chunks):
                async for pcm in chunks:
                    while not self._live and self._timeline.received - self._timeline.transcribed > 2 * AHEAD:
                        await self._wait()
                    self._timeline.add_audio(pcm)
                    self._more.set()
                    if lost := self._timeline.drop_oldest(round(KEEP_SECONDS * RATE)):
                        start, end = lost[0] / RATE, lost[1] / RATE
                        self.missing.append((start, end))
                        self._notify("AUDIO_LOST", f"audio from {start:.1f} to {end:.1f} s is lost")
        finally:
            self._ended = True
            self._more.set()

    async def _feed(self, session: Session) -> None:
        """Send the audio from `_sent` on, at most AHEAD before the deltas."""
        try:
            while self._sent >= self._timeline.committed:  # else that audio was dropped
                room = self._timeline.transcribed + AHEAD - self._sent
                pcm = self._timeline.audio(self._sent, min(PIECE, room)) if room > 0 else b""
                if pcm:
                    await session.send(pcm)
                    self._sent += len(pcm) // 2
                elif self._ended and self._sent >= self._timeline.received:
                    return await session.finish()
                else:
                    await self._wait()
        except SessionLost:
            pass  # `_step` raises it too, after the deltas that came before

    async def _audio_there(self) -> bool:
        """Wait for audio to send; return False if no more comes."""
        self._progress = self._progress or asyncio.get_running_loop().time()
        while self._timeline.received <= self._timeline.committed and not self._ended:
            await self._wait()
            self._progressed()
        return self._timeline.received > self._timeline.committed

    async def _wait(self) -> None:
        self._more.clear()
        await self._more.wait()
