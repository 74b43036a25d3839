"""Programs of kernels, taking turns on the CPU in an order drawn at random: what runs beside what, and when.

Launches follow each other in a stream, and overlap as programmatic dependent launch lets them (rules: overlap.py).
Warps of a partition are one `Task`, a thread that runs while all others stand still. What hardware does by itself, say
a copy by TMA, is a move: it happens at any time after it is asked for, at the latest when nobody else can go on.
If then nobody can, the kernel hangs, and `HangError` says who waits for what.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from random import Random

LONGEST = 300
"""Seconds of a stream, hundreds of times more than any takes."""


class HangError(RuntimeError):
    """Nobody can go on."""


class MisuseError(RuntimeError):
    """A kernel does what the hardware does not allow, or what it would not notice."""


class _StoppedError(BaseException):
    """Another task failed."""


class Launch:
    """A kernel's programs. overlaps: those of the launch before it may still run when they start."""

    def __init__(self, name: str, grid: tuple[int, ...], overlaps: bool, body: Callable[[], None]) -> None:
        self.name, self.overlaps, self.body = name, overlaps, body
        self.grid = (*grid, 1, 1)[:2]
        self.programs = [(x, y) for y in range(self.grid[1]) for x in range(self.grid[0])]
        self.before: Launch | None = None
        self.let: set[tuple[int, int]] = set()  # programs that let the next launch start
        self.waited: set[tuple[int, int]] = set()
        self.ended: set[tuple[int, int]] = set()

    @property
    def is_over(self) -> bool:
        return len(self.ended) == len(self.programs)

    @property
    def may_start(self) -> bool:
        before = self.before
        if before is None or before.is_over:
            return True
        return self.overlaps and len(before.let | before.ended) == len(before.programs)

    def end(self, program: tuple[int, int]) -> None:
        if self.overlaps and program not in self.waited:
            raise MisuseError(f"{self.name} ends without a wait for what ran before it")
        self.ended.add(program)


class Task:
    """Warps that run the same code."""

    def __init__(
        self, machine: Machine, body: Callable[[], None], launch: Launch, program: tuple[int, int], name: str
    ) -> None:
        self.launch, self.program = launch, program
        self.name, self.number = name, len(machine.tasks)
        self.done = False
        self.condition: Callable[[], bool] | None = None
        self.waits_for = ""
        self.products: list[Callable[[], None]] = []  # issued, not known to be complete
        self.stores: list[Move] = []  # by TMA
        self.copies: list[list[Move]] = [[]]  # cp.async: groups, the last of which is open
        self.turn = threading.Semaphore(0)
        self._machine, self._body = machine, body
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.turn.acquire()
        try:
            if self._machine.error is None:
                self._body()
                self.finish()
        except _StoppedError:
            pass
        except BaseException as error:
            self._machine.error = self._machine.error or error
        self.done = True
        self._machine.leave()

    def finish(self) -> None:
        """What was left to itself is done."""
        while self.products:
            self.products.pop(0)()
        for store in self.stores:
            store.happen()


class Move:
    """Something that happens by itself, once."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.happened = False
        self._act = act

    def happen(self) -> None:
        if not self.happened:
            self.happened = True
            self._act()


class Barrier:
    """An mbarrier: a phase is over when `count` have arrived and all expected bytes have come."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0
        self.phase, self._missing, self._bytes = 0, 0, 0

    def init(self, count: int) -> None:
        self.count = self._missing = count

    def arrive(self, count: int = 1) -> None:
        if count > self._missing:
            raise MisuseError(f"{self.name}: {self.count} arrive in a phase, and now {count - self._missing} more")
        self._missing -= count
        self._look()

    def expect(self, size: int) -> None:
        self._bytes += size
        self.arrive()

    def come(self, size: int) -> None:
        self._bytes -= size
        self._look()

    def is_over(self, parity: int) -> bool:
        return self.phase & 1 != parity

    def _look(self) -> None:
        if not self._missing and not self._bytes:
            self.phase, self._missing = self.phase + 1, self.count


class Machine:
    """All programs of a stream."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.error: BaseException | None = None
        self.tasks: list[Task] = []
        self.moves: list[Move] = []
        self.changes = 0  # of global memory
        self.current: Task
        self._over = threading.Event()

    def run(self, launches: Sequence[Launch]) -> None:
        """Until all programs have ended."""
        self._over.clear()
        for launch, before in zip(launches, [None, *launches], strict=False):
            launch.before = before
            for program in launch.programs:
                body = partial(self._program, launch, program)
                self.start(body, launch, program, f"program {program} of {launch.name}")
        self.leave()
        if not self._over.wait(LONGEST):
            waits = "; ".join(f"{task.name} waits for {task.waits_for or 'its turn'}" for task in self.tasks)
            raise HangError(f"no end after {LONGEST} s: {waits}")
        for task in self.tasks:
            task.thread.join()
        self.tasks.clear()
        self.moves.clear()
        if self.error is not None:
            raise self.error

    def start(self, body: Callable[[], None], launch: Launch, program: tuple[int, int], name: str) -> Task:
        task = Task(self, body, launch, program, name)
        self.tasks.append(task)
        task.thread.start()
        return task

    def _program(self, launch: Launch, program: tuple[int, int]) -> None:
        self.wait(lambda: launch.may_start, "the launch before")
        launch.body()
        self.current.finish()
        launch.end(program)

    def leave(self) -> None:
        """The current task, if any, has ended."""
        found = None
        if self.error is None:
            try:
                found = self._draw()
            except BaseException as error:
                self.error = error
        if self.error is not None:  # the others end, one after another
            found = next((task for task in self.tasks if not task.done), None)
        if found is None:
            self._over.set()
        else:
            self.current = found
            found.turn.release()

    def pause(self) -> None:
        """Another task may go on here."""
        if self.random.random() < 0.5:
            self._give_way()

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """The current task goes on when this is so."""
        task = self.current
        self.pause()
        if not condition():
            task.condition, task.waits_for = condition, what
            self._give_way()
            task.condition = None

    def move(self, act: Callable[[], None]) -> Move:
        self.moves.append(Move(act))
        return self.moves[-1]

    def _give_way(self) -> None:
        task, found = self.current, self._draw()
        if found is None or found is task:
            if self.error is not None:
                raise _StoppedError
            return
        self.current = found
        found.turn.release()
        task.turn.acquire()
        if self.error is not None:
            raise _StoppedError

    def _draw(self) -> Task | None:
        """Who goes on, None if all have ended."""
        left = [task for task in self.tasks if not task.done]
        while left:
            self.moves = [move for move in self.moves if not move.happened]
            able = [task for task in left if task.condition is None or task.condition()]
            if self.moves and (not able or self.random.random() < 0.3):
                self.random.choice(self.moves).happen()
            elif able:
                return self.random.choice(able)
            else:
                waits = "; ".join(f"{task.name} waits for {task.waits_for}" for task in left)
                self.error = HangError(f"nobody can go on: {waits}")
                return left[0]
        return None
