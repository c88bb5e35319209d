"""One server's part in its job's checkpoints: it agrees with the other servers on the beginning, restores and saves.

The first living server decides how the job begins, and tells all others. After its death the next one tells them again,
its own decision if it has heard of none. No shard begins before its server knows the decision. So when the first server
dies before it has told all others, no worker has all shards yet, and a later decision may replace one that only some
servers have heard of.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparsecomm.errors import StateError, WireError
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.protocol.roster import Roster
from sparsecomm.ps.protocol.sharding import ModelLayout, Piece
from sparsecomm.ps.server.checkpoint import Beginning, Checkpoints
from sparsecomm.ps.server.saved import Attempt, Facts, SavedVersion
from sparsecomm.ps.server.shard import Shard
from sparsecomm.ps.server.shard_file import Content, State, load
from sparsecomm.ps.server.versions import path_of, prune, put
from sparsecomm.transport.mailbox import Mailbox

__all__ = ["Saving", "fill"]

_BEGIN_FIELDS: dict[str, type] = {"attempt": dict, "source": dict, "error": str}


class Saving:
    """One server's part in its job's checkpoints. Without checkpoints it does nothing.

    Args:
        options: The options of the checkpoints; None for none.
        mailbox: Mailbox of the server.
        roster: The ranks of the job, as the server knows them.
        events: Events of the server. Mutated: it gets all that goes wrong.
    """

    def __init__(self, options: Checkpoints | None, mailbox: Mailbox, roster: Roster, events: list[str]) -> None:
        self._options = options
        self._mailbox = mailbox
        self._roster = roster
        self._events = events
        self._begins: Beginning | StateError | None = None
        self._told = False
        self._problems: dict[int, str] = {}

    @property
    def decided(self) -> bool:
        """Whether shards may begin."""
        return self._options is None or self._begins is not None

    def lead(self) -> None:
        """As the first living server, tells the others how the job begins, once. Decides it if nobody has."""
        if self._options is None or self._told or self._roster.owner(0) != self._mailbox.rank:
            return
        self._told = True
        if self._begins is None:
            try:
                self._begins = self._options.begin(self._events.append)
            except StateError as error:
                self._begins = error
        message = ms.pack(Envelope(Kind.BEGIN, 0, self._mailbox.rank), ms.json_body(_said(self._begins)))
        for rank in self._roster.others:
            self._mailbox.send(rank, message)

    def hear(self, envelope: Envelope, body: torch.Tensor) -> None:
        """Takes over the decision in a BEGIN of another server.

        Raises:
            WireError: If it is not one.
            StateError: If it resumes another version than the one that this server has heard of.
        """
        sender = envelope.sender
        begins = _heard(ms.read_json(body, _BEGIN_FIELDS, sender), sender)
        before = self._begins
        if isinstance(before, Beginning) and isinstance(begins, Beginning) and before.source != begins.source:
            raise StateError(f"server rank {sender} resumes {begins.source}, this server {before.source}")
        self._begins = begins

    def restore(self, shard: Shard, layout: ModelLayout) -> None:
        """Fills a new shard from the version that the job resumes, if it resumes one.

        Args:
            shard: Mutated, unless there is an error.
            layout: Layout of the model.

        Raises:
            StateError: If the job must not begin, or a file of the version is damaged or of another model.
        """
        if isinstance(self._begins, StateError):
            raise StateError(str(self._begins))
        if self._options is not None and self._begins is not None and self._begins.source is not None:
            fill(Path(self._options.folder), self._begins.source, shard, layout)

    def save(self, shard: Shard) -> None:
        """Saves a shard if its version is due. A problem is an event, and told again only when it changes."""
        options, index = self._options, shard.spec.index
        if options is None or not options.every or shard.version % options.every:
            return
        problem = self._write(options, shard)
        if problem != self._problems.get(index, ""):
            text = problem or f"shard {index} is saved as usual again"
            self._events.append(f"checkpoint of version {shard.version}: {text}")
        self._problems[index] = problem

    def _write(self, options: Checkpoints, shard: Shard) -> str:
        """Writes a shard and removes old versions; returns what went wrong, or nothing."""
        spec, folder = shard.spec, Path(options.folder)
        if not isinstance(self._begins, Beginning):  # two servers have died at once, and this one has a copy
            return f"shard {spec.index} was not saved: this server has not heard yet how the job begins"
        saved = SavedVersion(self._begins.attempt, shard.version, spec.shards, str(spec.model_hash))
        facts = Facts(saved, spec.index, spec.start, spec.end)
        try:
            put(folder, Content(facts, shard.values, shard.piece_states()))
        except Exception as error:  # a failure to save must not end training, whatever it is
            why = str(error) or type(error).__name__
            return f"shard {spec.index} was not saved in {folder}: {why}; training goes on"
        try:
            prune(folder, facts, options.keep)
        except OSError as error:
            return f"shard {spec.index} was saved, but older versions in {folder} were not removed: {error}"
        return ""


def _said(begins: Beginning | StateError) -> dict[str, Any]:
    """Returns a decision as the fields of a BEGIN."""
    if isinstance(begins, StateError):
        return {"attempt": {}, "source": {}, "error": str(begins)}
    source = {} if begins.source is None else asdict(begins.source)
    return {"attempt": asdict(begins.attempt), "source": source, "error": ""}


def _heard(said: dict[str, Any], sender: int) -> Beginning | StateError:
    """Returns the decision in the fields of a BEGIN."""
    if said["error"]:
        return StateError(said["error"])
    try:
        source = SavedVersion.of(said["source"]) if said["source"] else None
        return Beginning(attempt=Attempt(**said["attempt"]), source=source)
    except (TypeError, StateError) as error:
        raise WireError("begin", str(said)[:80], str(error), rank=sender) from error


def fill(folder: Path, source: SavedVersion, shard: Shard, layout: ModelLayout) -> None:
    """Fills a new shard from the files of a version that overlap it.

    Args:
        folder: The folder of all versions.
        source: The version.
        shard: Mutated, unless there is an error.
        layout: Layout of the model.

    Raises:
        StateError: If a file is damaged, of another model, or not the one that it should be. It names the file.
    """
    spec = shard.spec
    if source.model != str(layout.hash) or source.shards > layout.numel:
        path = path_of(folder, source, 0).parent
        raise StateError(f"{path} is a checkpoint of another model: its names and shapes differ from this job's")
    values = torch.zeros(spec.numel, dtype=torch.float32)
    states: list[State] = [{} for _ in spec.pieces]
    for index in range(source.shards):
        old = layout.shard(index, source.shards)
        low, high = max(old.start, spec.start), min(old.end, spec.end)
        if low >= high:
            continue
        path = path_of(folder, source, index)
        content = load(path)
        expected = Facts(source, index, old.start, old.end)
        if content.facts != expected or len(content.states) != len(old.pieces):
            raise StateError(f"{path} holds {content.facts} in {len(content.states)} pieces, not {expected}")
        values[low - spec.start : high - spec.start] = content.values[low - old.start : high - old.start]
        for piece, state in zip(spec.pieces, states, strict=True):
            for old_piece, old_state in zip(old.pieces, content.states, strict=True):
                _join(piece, state, old_piece, old_state)
    shard.restore(values, source.version, states)


def _join(piece: Piece, state: State, old: Piece, old_state: State) -> None:
    """Adds the state of an old piece to that of a piece that it overlaps.

    State that is not elementwise, such as a step count, is the same in all of them. Elements of which no old piece has
    state get zeros, with which optimizers begin.
    """
    low, high = max(old.start, piece.start), min(old.end, piece.end)
    if old.name != piece.name or low >= high:
        return
    for key, value in old_state.items():
        if not isinstance(value, torch.Tensor):
            state[key] = value
        elif value.shape != (old.end - old.start,):
            state[key] = value.clone()
        else:
            whole = state.get(key)
            if not isinstance(whole, torch.Tensor) or whole.shape != (piece.end - piece.start,):
                whole = state[key] = torch.zeros(piece.end - piece.start, dtype=value.dtype)
            whole[low - piece.start : high - piece.start] = value[low - old.start : high - old.start]
