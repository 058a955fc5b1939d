"""The checks that job folders and converted folders share: files are compared with records of their sizes and hashes.

Files are named by their path in the folder. Nothing is repaired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bigq.errors import BigqError
from bigq.inspect.evaluations import EVALUATIONS_NAME
from bigq.inspect.scan import Scan, scan_shard
from bigq.io.atomic import TEMP_SUFFIX
from bigq.io.checksum import load_record, read_record_bytes, unseal
from bigq.io.folders import STATE_FOLDER
from bigq.io.formats import Format, PackedLinear
from bigq.io.shard_record import file_sha256
from bigq.job.away import Away
from bigq.job.finish import CARD_NAME
from bigq.job.journal import JOURNAL_NAME, Commit
from bigq.job.manifest import MANIFEST_NAME
from bigq.job.owner import LOCK_NAME, OWNER_NAME, Holder

# Records, as messages name them.
JOURNAL, MANIFEST, OWNER, EVALUATIONS, LOCK = (
    f"{STATE_FOLDER}/{name}" for name in (JOURNAL_NAME, MANIFEST_NAME, OWNER_NAME, EVALUATIONS_NAME, LOCK_NAME)
)


class FolderCheck:
    """The problems of a folder that bigq wrote.

    remedy: how to repair the folder. problems: one line each. bad: the files with problems. listing: every file of the folder and its
    state folder by path: its size, or None if it is not a file. busy: whether a process may be writing to the folder now.
    commits: of the journal, by unit. manifest: size and hash of the folder's files by path; None if it is missing or damaged.
    free: files that the manifest does not cover, since people may change them. away: shards on the hub instead; astray: what is wrong
    with those of them that are not there either, by file.
    """

    def __init__(self, out: Path, remedy: str) -> None:
        self.out, self.remedy = out, remedy
        self.problems: list[str] = []
        self.bad: set[str] = set()
        self.listing = list_folder(out)
        self.busy = self._is_busy()
        self.free: set[str] = set()
        self.away: Away | None = None
        self.astray: dict[str, str] = {}

    # Collecting problems.

    def add(self, file: str, text: str) -> None:
        self.bad.add(file)
        self.problems.append(f"{file}: {text}")

    def add_all(self, found: Iterable[tuple[str, str]]) -> None:
        for file, text in found:
            self.add(file, text)

    def add_error(self, file: str, error: BigqError) -> None:
        """Add an error that occurred when ``file`` was read; the error may name another file."""
        text = str(error).replace(f"{self.out}/", "").removeprefix(f"{self.out}: ")
        named = next((name for name in self.listing if text.startswith(f"{name}: ")), file)
        self.add(named, text.removeprefix(f"{named}: "))

    # Reading records.

    def _is_busy(self) -> bool:
        try:
            holder = Holder.read(self.out / STATE_FOLDER)
        except BigqError as error:
            self.add_error(OWNER, error)
            return True
        if holder is None and OWNER in self.listing:
            self.add(OWNER, f"cannot be read; {self.remedy}")
        return holder is not None and holder.alive is not False

    def lines(self, file: str) -> list[bytes]:
        """The lines of a record with their newlines; none where it cannot be read."""
        try:
            return (read_record_bytes(self.out / file) or b"").splitlines(keepends=True)
        except BigqError as error:
            self.add_error(file, error)
            return []

    def sealed(self, file: str) -> dict[str, Any] | None:
        """A record that carries a checksum; None where there is none or it is damaged."""
        try:
            return load_record(self.out / file, self.remedy)
        except BigqError as error:
            self.add_error(file, error)
            return None

    def check_lines(self, file: str) -> list[bytes]:
        """The lines of a record, each of which must carry a sound checksum."""
        lines = self.lines(file)
        for number, line in enumerate(lines, 1):
            if unseal(line, line=True) is None:
                self.add(file, f"line {number} is damaged or was changed by hand")
        return lines

    def read_journal(self) -> dict[str, Commit]:
        """The commits, by unit."""
        commits: dict[str, Commit] = {}
        for number, line in enumerate(self.lines(JOURNAL), 1):
            commit = Commit.from_line(line)
            if commit is None:
                self.add(JOURNAL, f"line {number} is damaged or was changed by hand")
            elif commit.unit in commits:
                self.add(JOURNAL, f"line {number} commits {commit.unit} once more")
            else:
                commits[commit.unit] = commit
        return commits

    def read_manifest(self) -> dict[str, Any] | None:
        """Size and hash of the folder's files by path; None where there is no manifest or it is damaged."""
        manifest = self.sealed(MANIFEST)
        if manifest is None:
            return None
        files = manifest.get("files")
        self.free = {CARD_NAME} if manifest.get("free") == [CARD_NAME] else set()
        if isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values()):
            return files
        self.add(MANIFEST, "is not a list of files")
        return None

    # Comparing files with records.

    def compare(self, file: str, records: Mapping[str, Mapping[str, Any]], scan: Scan | None = None) -> None:
        """Compare a file with its size and hash in each record. scan: provides the file's hash."""
        size = self.listing.get(file)
        if size is None:
            what = "is not a file" if file in self.listing else self.astray.get(file, "is missing")
            self.add(file, f"{what}, although {' and '.join(records)} lists it")
            return
        for record, entry in records.items():
            if size != entry.get("size"):
                self.add(file, f"has {size} bytes, but {entry.get('size')} by {record}")
                return
        if file in self.bad:
            return
        try:
            sha256 = file_sha256(self.out / file) if scan is None else scan.sha256
        except BigqError as error:
            self.add_error(file, error)
            return
        differing = [record for record, entry in records.items() if entry.get("sha256") != sha256]
        if differing:
            self.add(file, f"was changed after it was written: its hash differs from {' and '.join(differing)}")

    def scan(self, commit: Commit, format: Format, manifest: Mapping[str, Any] | None) -> Scan | None:
        """Read a committed shard, and compare it with the journal and the manifest. None where it cannot be read."""
        file = commit.shard.file
        records: dict[str, Mapping[str, Any]] = {JOURNAL: {"size": commit.shard.size, "sha256": commit.shard.sha256}}
        if manifest is not None and file in manifest:
            records[MANIFEST] = manifest[file]
        scan = None
        if self.listing.get(file) is not None:
            try:
                read = None if self.away is None else self.away.header(self.out, file)
                scan = scan_shard(self.out / file, format, read)
            except BigqError as error:
                self.add_error(file, error)
        self.compare(file, records, scan)
        if scan is None:
            return None
        self.add_all((file, problem) for problem in scan.problems)
        if tuple(scan.tensors) != commit.shard.tensors:
            self.add(file, f"does not hold the tensors that {JOURNAL} says ({_difference(scan, commit)})")
        if Counter(scan.linears.values()) != Counter(map(recorded_geometry, commit.linears)):
            self.add(file, f"does not hold the packed Linears that {JOURNAL} says")
        return scan

    def check_listing(self, known: set[str], *, complete: bool) -> None:
        """Report the files that no record lists. complete: whether a manifest lists all files of the folder.

        Other names that begin with a dot belong to other programs.
        """
        folders = {parent for file in known for parent in Path(file).parents}
        unknown = {str(_unknown_part(Path(file), folders)) for file in self.listing.keys() - known if Path(file) not in folders}
        for file in sorted(unknown):
            path = Path(file)
            passing = file.endswith(TEMP_SUFFIX) or path.match(f"{STATE_FOLDER}/activations-*.safetensors")
            if path.name.startswith(".") or (passing and self.busy):
                continue
            # Without a manifest, side files of the model cannot be distinguished from foreign files.
            if passing or path.suffix == ".safetensors" or path.parts[0] == STATE_FOLDER or complete:
                self.add(file, "no record lists it: it is left over from a killed run or was put there by hand; remove it")


def _unknown_part(path: Path, folders: set[Path]) -> Path:
    """A file that no record lists, or the outermost of its folders that holds nothing else. folders: that hold files of a record."""
    return next((parent for parent in reversed(path.parents) if parent not in folders), path)


def list_folder(out: Path) -> dict[str, int | None]:
    """Everything in the folder, its state folder and folders that are not hidden, by path: the size of a file, None for anything else.

    A folder that holds something is there by what it holds.
    """
    found: dict[str, int | None] = {}
    left = [out, out / STATE_FOLDER]
    for folder in left:
        for path in sorted(folder.iterdir()):
            inner = path.is_dir() and not path.is_symlink() and not path.name.startswith(".") and folder.name != STATE_FOLDER
            if inner and any(path.iterdir()):
                left.append(path)
            else:
                found[path.relative_to(out).as_posix()] = path.stat().st_size if path.is_file() else None
    return found


def recorded_geometry(record: Mapping[str, Any]) -> PackedLinear | None:
    """The dimensions of a packed Linear from its record in the journal; None if the record is invalid."""
    try:
        (m, n), size = record["shape"], record["group_size"]
        return PackedLinear(bits=record["bits"], outputs=m, inputs=n, groups=1 if size == -1 else n // size)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _difference(scan: Scan, commit: Commit) -> str:
    here, said = set(scan.tensors), set(commit.shard.tensors)
    if here == said:
        return "their order differs"
    name = min(here ^ said)
    return f"for example, {name} is {'there' if name in here else 'missing'}"
