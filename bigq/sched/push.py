"""``--push``: shards are uploaded to a hub repository beside the computation, and with ``--push-drop`` removed once the hub has them.

    shard committed → line "sent" → upload, commit on the hub → the hub says what it holds → line "confirmed" → local shard removed

A thread takes all shards that wait into one commit, since the hub limits commits by the hour. What it did not finish, the next run does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigq import faults
from bigq.config import JobConfig
from bigq.errors import ResourceError, UsageError
from bigq.io.folders import STATE_FOLDER
from bigq.io.remote.push import WAITING_BYTES, WAITING_SHARDS, HubRepository, Local
from bigq.io.remote.ranged import Closed
from bigq.io.remote.shards import PATIENT, QUICK
from bigq.io.shard_record import file_sha256
from bigq.job.away import Away, look_up
from bigq.job.finish import CARD_NAME, is_card
from bigq.job.journal import Commit
from bigq.job.manifest import read_manifest
from bigq.job.pushed import Pushed, PushRecord, foreign_files, read_pushed, repository_of
from bigq.progress.sizes import show_size
from bigq.sched.control import Control

#: Seconds between two commits on the hub, which takes some 128 an hour; fewer only where the loop waits for one.
INTERVAL = 30.0
#: Seconds that a job which ends early leaves to an upload that is under way.
_LAST_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """The repository of a job that uploads, as found before the job begins. away: what it holds. drop: whether local shards are removed.

    notes: for the user.
    """

    hub: HubRepository
    away: Away
    drop: bool
    notes: tuple[str, ...]

    def has_all(self, out: Path, commits: Sequence[Commit]) -> bool:
        """Whether the repository holds all files of a finished folder. Raises CheckpointError, ResourceError."""
        files = [*(_local(out, commit) for commit in commits), *last_files(out, commits)]
        return all(self.away.has(file, self.hub.name) for file in files)


def open_push(config: JobConfig, out: Path) -> Push | None:
    """Check that a job may write to its repository, which is created if it does not exist. None without ``--push``.

    A repository with files that are not the job's is refused. Raises UsageError, ResourceError, CheckpointError.
    """
    entries, _ = read_pushed(out)
    name = repository_of(out, entries, config.push)
    if name is None:
        return None
    hub = HubRepository(name, QUICK)
    new = hub.prepare()
    notes = [f"--push: {name} is new on the hub, and private"] if new else []
    if config.push is None:
        notes.append(f"shards of the job in {out} are in {name} only, so it goes on with --push {name}")
    foreign = foreign_files(hub.names(), entries, name)
    if foreign:
        count = "" if len(foreign) == 1 else f" and {len(foreign) - 1} more files"
        raise UsageError(
            f"--push {name}: holds {foreign[0]}{count}, which the job in {out} has not uploaded; name a new repository, or empty this one"
        )
    return Push(hub=hub, away=Away(entries, look_up(entries, hub), PATIENT), drop=config.push_drop, notes=tuple(notes))


class Pusher:
    """Uploads the shards of a job that owns its folder. Methods raise the error that ended the thread, if one did.

    owned: raises ResourceError once another process owns the folder.
    """

    def __init__(self, push: Push, out: Path, control: Control, owned: Callable[[], None]) -> None:
        self._push, self._out, self._control, self._owned = push, out, control, owned
        push.hub.say, push.hub.patience = control.progress.say, PATIENT
        self._record = PushRecord(out)
        self._changed = threading.Condition()
        self._waiting: dict[str, Commit] = {}
        self._droppable: set[str] = set()
        self._held: set[str] = set()
        self._error: BaseException | None = None
        self._closed = self._hurry = self._told = False
        #: Of the last commit on the hub.
        self._last = -INTERVAL
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)

    def begin(self, commits: Iterable[Commit]) -> None:
        """Start the thread. commits: of earlier runs. They stay until ``hold`` says which of them are read."""
        self._held = {commit.shard.file for commit in commits}
        for commit in commits:
            if self._push.away.has(_local(self._out, commit), self._push.hub.name):
                self._droppable |= {commit.shard.file} if self._push.drop else set()
            else:
                self._waiting[commit.shard.file] = commit
        self._thread.start()

    def add(self, commit: Commit) -> None:
        """A shard was committed. With ``--push-drop``, wait while too many others wait for their upload."""
        with self._changed:
            if self._closed:
                return
            self._require_sound()
            self._waiting[commit.shard.file] = commit
            self._changed.notify_all()
            while self._push.drop and self._is_full() and not (self._control.stop.requested or self._closed):
                if not self._told:
                    self._told = True
                    self._control.progress.say(
                        f"{len(self._waiting)} shards, {self._waiting_bytes()}, wait for their upload to {self._push.hub.name}; the job "
                        "waits for it now and then, so that the disk does not fill"
                    )
                self._changed.wait(0.5)
                self._require_sound()

    def hold(self, files: Iterable[str]) -> None:
        """These shards, and no others, will be read again: they stay until they are released."""
        with self._changed:
            self._held = set(files)
            self._changed.notify_all()

    def release(self, files: Iterable[str]) -> None:
        """These shards are not read again."""
        with self._changed:
            self._held -= set(files)
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until the hub has every shard. Raises Stopped if the job was asked to stop."""
        with self._changed:
            self._hurry = True
            self._held.clear()
            self._changed.notify_all()
            while self._waiting or self._droppable:
                self._require_sound()
                if self._control.stop.requested:
                    raise self._control.stop.error(f"while shards were uploaded to {self._push.hub.name}")
                self._control.progress.phase(f"upload: {len(self._waiting)} shards left")
                self._changed.wait(0.5)
            self._require_sound()

    def finish(self, commits: Sequence[Commit]) -> None:
        """Upload the other files of the finished folder, config.json among them, by one commit: from there on, the repository loads."""
        self.drain()
        self._control.progress.phase("upload: the last files")
        name = self._push.hub.name
        self._upload(last_files(self._out, commits), "config.json and all other files: the model is complete")
        here = "; its shards are not here any more" if self._push.drop else ""
        self._control.progress.say(f"the model is in {name} on the hub{here}")

    def close(self) -> None:
        """End the thread. What was not uploaded, the next run uploads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._push.hub.close()
        if self._thread.ident is not None:
            self._thread.join(_LAST_SECONDS)

    def _require_sound(self) -> None:
        if self._error is not None:
            raise self._error

    def _is_full(self) -> bool:
        return len(self._waiting) > WAITING_SHARDS and sum(commit.shard.size for commit in self._waiting.values()) > WAITING_BYTES

    def _waiting_bytes(self) -> str:
        return show_size(sum(commit.shard.size for commit in self._waiting.values()))

    def _run(self) -> None:
        try:
            while (batch := self._next()) is not None:
                if batch:
                    self._last = time.monotonic()
                    self._upload([_local(self._out, commit) for commit in batch], _message(batch))
                self._drop()
        except Closed:
            pass
        except OSError as error:
            self._failed(ResourceError(f"{self._out}: uploading failed: {error.strerror}; run the same command again"))
        except BaseException as error:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _next(self) -> list[Commit] | None:
        """What to upload next, all in one commit; nothing where there only are shards to remove; None once it is closed."""
        with self._changed:
            while not self._closed:
                early = self._hurry or (self._push.drop and self._is_full())
                left = 0.0 if early else self._last + INTERVAL - time.monotonic()
                if self._waiting and left <= 0:
                    return list(self._waiting.values())
                if self._droppable - self._held:
                    return []
                self._changed.wait(left if self._waiting else None)
            return None

    def _upload(self, files: Sequence[Local], message: str) -> None:
        """Upload files, and record durably that the hub has them."""
        hub = self._push.hub
        sent = [Pushed(file=file.name, size=file.size, sha256=file.sha256, repository=hub.name) for file in files]
        self._write(sent)
        revision, held = hub.upload(files, message)
        faults.point("push.uploaded")
        drop = self._push.drop
        for file in files:
            if file.name.endswith(".safetensors") and held[file.name].sha256 is None:
                raise ResourceError(
                    f"{hub.name}/{file.name}: the hub keeps it in git itself and not as a large file, so it does not say its hash; add "
                    "'*.safetensors filter=lfs diff=lfs merge=lfs -text' to the repository's .gitattributes, and remove the file there"
                )
        done = [
            dataclasses.replace(entry, revision=revision, confirmed=True, dropped=drop and entry.file in self._waiting) for entry in sent
        ]
        self._write(done)
        faults.point("push.recorded")
        with self._changed:
            for entry in done:
                self._push.away.took(entry)
                if (commit := self._waiting.get(entry.file)) is not None and commit.shard.sha256 == entry.sha256:
                    del self._waiting[entry.file]
                    self._droppable |= {entry.file} if drop else set()
            self._changed.notify_all()

    def _write(self, entries: Sequence[Pushed]) -> None:
        """Append to the record, unless the run has ended meanwhile."""
        with self._changed:
            if self._closed:
                raise Closed
            self._owned()
            self._record.add(entries)

    def _drop(self) -> None:
        """Remove the shards that the hub has and nobody reads."""
        with self._changed:
            ready = sorted(self._droppable - self._held)
            if self._closed:
                raise Closed
            self._mark_dropped(ready)
            for file in ready:
                try:
                    (self._out / file).unlink(missing_ok=True)
                except OSError as error:
                    raise ResourceError(
                        f"{self._out / file}: cannot be removed: {error.strerror}; check the folder's permissions, then run the same "
                        "command again"
                    ) from error
                faults.point("push.dropped")
            self._droppable -= set(ready)
            self._changed.notify_all()

    def _mark_dropped(self, files: Sequence[str]) -> None:
        """Shards that were kept by an earlier run may go now, and the record says so first."""
        kept = [self._record.entries[file] for file in files if not self._record.entries[file].dropped]
        if kept:
            marked = [dataclasses.replace(entry, dropped=True) for entry in kept]
            self._record.add(marked)
            for entry in marked:
                self._push.away.took(entry)


@contextlib.contextmanager
def pushing(
    push: Push | None, out: Path, commits: Sequence[Commit], control: Control, owned: Callable[[], None]
) -> Iterator[Pusher | None]:
    """Upload beside what runs in the context. commits: of earlier runs. owned: as for ``Pusher``."""
    if push is None:
        yield None
        return
    pusher = Pusher(push, out, control, owned)
    for note in push.notes:
        control.progress.say(note)
    try:
        pusher.begin(commits)
        yield pusher
    finally:
        pusher.close()


@contextlib.contextmanager
def abandoned_on_error(pusher: Pusher | None) -> Iterator[None]:
    """If what runs in the context fails, nothing waits for uploads any more."""
    try:
        yield
    except BaseException:
        if pusher is not None:
            pusher.close()
        raise


def last_files(out: Path, commits: Iterable[Commit]) -> list[Local]:
    """The files of a finished folder without its shards and the job's records. Raises CheckpointError, ResourceError."""
    shards = {commit.shard.file for commit in commits}
    files = {name: entry for name, entry in read_manifest(out)["files"].items() if not name.startswith(f"{STATE_FOLDER}/")}
    if is_card(card := out / CARD_NAME):  # it may change, so the manifest does not list it
        files[CARD_NAME] = {"size": card.stat().st_size, "sha256": file_sha256(card)}
    left = sorted(files.keys() - shards)
    return [Local(name=name, path=out / name, size=files[name]["size"], sha256=files[name]["sha256"]) for name in left]


def _local(out: Path, commit: Commit) -> Local:
    shard = commit.shard
    return Local(name=shard.file, path=out / shard.file, size=shard.size, sha256=shard.sha256)


def _message(batch: Sequence[Commit]) -> str:
    first, last = batch[0].shard.file, batch[-1].shard.file
    return first if len(batch) == 1 else f"{len(batch)} shards, {first} to {last}"
