"""Parse a pickle without executing it: the opcodes that checkpoint metadata consists of, read into inert records.

`parse` is a small interpreter. It imports nothing that a pickle names, calls nothing, sets no attribute, and hashes and
compares nothing that comes from the pickle. It makes values of these kinds, and ``metadata`` checks every field of them
before it makes torch's objects:

- a name to import: a `Name` of a fixed list, or a dtype, layout or memory format of torch; other names are an error
- an instance: a plain list ``[name, key, value, key, value, ...]`` or, if its state is not a dict, ``[name, state]``
- a dict: a `Table`, with keys and values in turn
- a list: an `Array`; a call: a `Call`, or the `torch.Size` if it is a call of ``torch.Size`` with plain lengths
- everything else: str, int, float, bool, None and tuple as they are

Time and memory are linear in the length of the pickle: containers are limited to one for every ten bytes (real metadata
has one for 29 or more, in the protocols 2 and 3 one for 11.6 or more), marks nest to a fixed depth, and numbers have at
most nine bytes. Objects may contain each other to any depth, since nothing here recurses, and Python frees nested lists
and tuples without recursion.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from azstoragetorch.checkpoint._format.records import ORDERED, SIZE, TENSOR, Array, Call, Name, Table, made_size, named
from azstoragetorch.exceptions import CheckpointError

_BYTES_PER_CONTAINER = 10  # a container and a string of a few letters take ten times as much memory as their opcodes
_BYTES_PER_WAITING = 8  # on the stack, where real metadata has a few thousand
_WAITING = 65536  # in any case
_CONTAINERS = 1024  # in any case
_DEPTH = 64  # of nested marks; metadata has 7
_LONGEST = 9  # bytes of a number
_SHORT = 8  # bytes of the opcode of a string that takes much more memory than that


_UNREFERENCED = Name("nothing", "refers to this")  # the state of an instance that was read in one go
_LINES = re.compile(rb"c([\w.]{1,200})\n([\w.]{1,200})\n", re.ASCII)
_MANY = range(8192)  # values are read without a look at how many there are on the stack
_SINGLETONS = {0x4E: None, 0x88: True, 0x89: False}
_INTEGERS = {
    0x4A: (struct.Struct("<xi").unpack_from, 5),
    0x4B: (struct.Struct("<xB").unpack_from, 2),
    0x4D: (struct.Struct("<xH").unpack_from, 3),
}
_u4 = struct.Struct("<xI").unpack_from
_u4_twice = struct.Struct("<xIxI").unpack_from
_NEW = b"\x81\x94}\x94("  # NEWOBJ MEMOIZE EMPTY_DICT MEMOIZE MARK: an instance with a dict as its state begins
# What the description of a tensor consists of: references, numbers, constants, and the opcodes that combine them.
_DESCRIPTION = re.compile(
    rb"\)\x81\x94\}\x94\((?:h.|j....|K.|M..|J....|[])\x81\x94}(N\x88\x89tba\x85-\x87Re]|ub){1,500}", re.DOTALL
)
_DESCRIPTIONS = 4096  # different ones that are kept
_f8 = struct.Struct(">xd").unpack_from


def parse(data: bytes) -> Any:
    """The value that the pickle *data* describes, of the kinds that the module lists.

    Raises:
        CheckpointError: it is cut or damaged, or has something in it that no metadata consists of.
    """
    try:
        return _Machine(data).run()
    except (IndexError, struct.error):
        why = "it ends too early, refers to an object that it does not contain, or makes too many objects for its size"
    except UnicodeDecodeError as error:
        why = f"it holds a string that is not valid UTF-8: {error.reason}"
    except (AttributeError, TypeError) as error:
        why = f"its instructions do not fit together: {error}"
    raise CheckpointError(f"the metadata is not an intact pickle: {why}")


# This loop is why metadata of 100,000 items is read in a second: most of a pickle are references and strings, and most
# instances have a state of nothing else, which goes into the record at once.
def _values(machine: _Machine, at: int) -> int:
    """Read values and instances of plain values from *at* on, up to another kind of opcode; returns where that is."""
    data, stack, memo = machine.data, machine.stack, machine.memo
    add, record = stack.append, None
    for _ in _MANY:
        op = data[at]
        if op == 0x6A:  # LONG_BINGET
            if data[at + 5] == 0x6A:
                first, second = _u4_twice(data, at)
                add(memo[first])
                add(memo[second])
                at += 10
            else:
                add(memo[_u4(data, at)[0]])
                at += 5
        elif op == 0x68:  # BINGET
            add(memo[data[at + 1]])
            at += 2
        elif op == 0x8C:  # SHORT_BINUNICODE
            end = at + 2 + data[at + 1]
            value = data[at + 2 : end].decode("utf-8", "surrogatepass")
            add(value)
            if end - at < _SHORT:
                machine.spend.pop()
            at = end
            if data[at] == 0x94:  # MEMOIZE
                memo.append(value)
                at += 1
        elif op == 0x29 and record is None and data[at + 1 : at + 6] == _NEW:  # EMPTY_TUPLE
            if stack[-1] is TENSOR and (end := machine.described_until(at)):
                at = end
                continue
            record = stack[-1] = [stack[-1]]
            memo += (record, _UNREFERENCED)
            add, at = record.append, at + 6
        elif op == 0x75 and record is not None and data[at + 1] == 0x62:  # SETITEMS BUILD: that was all of it
            add, record, at = stack.append, None, at + 2
        elif op in _INTEGERS:  # BININT, BININT1, BININT2
            read, size = _INTEGERS[op]
            add(read(data, at)[0])
            at += size
        elif op in _SINGLETONS:  # NONE, NEWTRUE, NEWFALSE
            add(_SINGLETONS[op])
            at += 1
        else:
            break
    if record is not None:
        machine.resume_on_stack(record)
    return at


class _Machine:
    """The state of the interpreter: what is on the stack, where the marks are, and the memo."""

    def __init__(self, data: bytes, stack: list[Any] | None = None, memo: list[Any] | None = None) -> None:
        self.data = data
        self.stack: list[Any] = [] if stack is None else stack
        self.marks: list[int] = []
        self.memo: list[Any] = [] if memo is None else memo
        # One is taken for every container. There being none left is an IndexError, which costs no comparison.
        self.spend = [None] * (len(data) // _BYTES_PER_CONTAINER + _CONTAINERS)
        self.most = len(data) // _BYTES_PER_WAITING + _WAITING
        # By code; None within a description, which is interpreted opcode by opcode.
        self.described: dict[bytes, tuple[Any, list[Any]] | None] | None = {} if stack is None else None

    def run(self) -> Any:
        """Interpret the whole pickle."""
        data, stack, marks, memo = self.data, self.stack, self.marks, self.memo
        push, memoize, spend, most = stack.append, memo.append, self.spend.pop, self.most
        at = 0
        while True:
            op = data[at]
            if op == 0x94:  # MEMOIZE
                memoize(stack[-1])
                at += 1
            elif op == 0x29 and data[at + 1 : at + 6] != _NEW:  # EMPTY_TUPLE
                if data[at + 1 : at + 3] == b"\x81\x94":  # NEWOBJ MEMOIZE: without a state, or with one of another kind
                    record = stack[-1] = [stack[-1]]
                    memoize(record)
                    spend()
                    at += 3
                else:
                    push(())
                    at = _values(self, at + 1)
            elif op == 0x28:  # MARK
                marks.append(len(stack))
                if len(marks) > _DEPTH or marks[-1] > most:
                    raise CheckpointError("the metadata is not an intact pickle: it nests too many objects")
                at = _values(self, at + 1)
            elif op == 0x75:  # SETITEMS
                at = self._set_items(at + 1)
            elif op == 0x74:  # TUPLE
                begin = marks.pop()
                value = tuple(stack[begin:])
                stack[begin:] = [value]
                spend()
                at += 1
                if data[at] == 0x94:  # MEMOIZE
                    memoize(value)
                    at = _values(self, at + 1)
            elif op == 0x2E:  # STOP
                return self._result(at)
            else:
                before, at = at, _values(self, at)
                if at == before:
                    at = _RARE.get(op, _refuse)(self, at)
                if len(stack) > most:
                    raise IndexError

    def described_until(self, at: int) -> int:
        """Read the description of a tensor from *at* on; returns where it ends, or 0 if it has to be interpreted.

        What opcodes make depends on nothing but these bytes and objects of the memo, which keep their numbers. So equal
        bytes make equal records, and one record serves for all of them. A pickle that changes it later, which only a
        forged one does, changes an inert list that is checked as any other.
        """
        described, found = self.described, _DESCRIPTION.match(self.data, at)
        if described is None or found is None:
            return 0
        code = found[0]
        if code in described:
            known = described[code]
        elif len(described) < _DESCRIPTIONS:
            known = described[code] = self._interpreted(code)
        else:
            return 0
        if known is None:
            return 0
        self.stack[-1] = known[0]
        self.memo += known[1]
        return found.end()

    def _interpreted(self, code: bytes) -> tuple[Any, list[Any]] | None:
        """The record that *code* makes of a name on the stack, with what it memoizes; None if it does anything else."""
        known = len(self.memo)
        inner = _Machine(code + b".", [self.stack[-1]], self.memo)
        try:
            made = inner.run()
        except (AttributeError, CheckpointError, IndexError, TypeError):
            made = None
        memoized = self.memo[known:]
        del self.memo[known:]
        is_whole = type(made) is list and made is memoized[0] and not inner.marks
        return (made, memoized) if is_whole else None

    def resume_on_stack(self, record: list[Any]) -> None:
        """Continue with *record*, whose state has more than plain values, as other dicts are read."""
        stack = self.stack
        stack.append(_UNREFERENCED)
        self.marks.append(len(stack))
        if len(self.marks) > _DEPTH:
            raise IndexError
        stack += record[1:]
        del record[1:]

    def _set_items(self, at: int) -> int:
        stack, begin = self.stack, self.marks.pop()
        items = stack[begin:]
        del stack[begin:]
        if self.data[at] == 0x62 and stack[-1] is _UNREFERENCED:  # BUILD: the state of an instance is complete
            stack.pop()
            at += 1
        stack[-1].extend(items)
        return at

    def _result(self, at: int) -> Any:
        if at + 1 != len(self.data) or len(self.stack) != 1:
            raise CheckpointError("the metadata is not an intact pickle: it continues behind its end")
        return self.stack[0]

    # -- rare opcodes: each returns where the next one is -------------------------------------------------------------

    def _push(self, value: Any, at: int) -> int:
        self.spend.pop()
        self.stack.append(value)
        return at

    def put(self, at: int) -> int:
        """BINPUT and LONG_BINPUT, which in the protocols 2 and 3 count as MEMOIZE does, and PUT, which is refused."""
        is_short = self.data[at] != 0x72
        number = self.data[at + 1] if is_short else _u4(self.data, at)[0]
        if number != len(self.memo) or self.data[at] == 0x70:
            raise CheckpointError(
                f"the metadata is not an intact pickle: it numbers an object {number} where {len(self.memo)} is next"
            )
        self.memo.append(self.stack[-1])
        return at + (2 if is_short else 5)

    def tuple_of(self, at: int) -> int:
        """TUPLE1, TUPLE2 and TUPLE3; most are the lengths of a torch.Size."""
        stack, count = self.stack, self.data[at] - 0x84
        items = tuple(stack[-count:])
        if len(items) != count:
            raise IndexError
        if self.data[at + 1 : at + 6] != b"\x94\x85\x94R\x94" or stack[-count - 1] is not SIZE:
            stack[-count:] = [items]
            self.spend.pop()
            return at + 1
        arguments = (items,)
        size = made_size(arguments)
        stack[-count - 1 :] = [size]
        self.memo += (_UNREFERENCED, _UNREFERENCED, size)
        self.spend.pop()
        return at + 6

    def new(self, at: int) -> int:
        """NEWOBJ: an instance whose state, if it has one, comes later."""
        arguments = self.stack.pop()
        if type(arguments) is not tuple or arguments:
            raise CheckpointError("the metadata makes an instance from arguments, which no metadata does")
        return self._push([self.stack.pop()], at + 1)

    def build(self, at: int) -> int:
        """BUILD: set the state of an instance."""
        state, record = self.stack.pop(), self.stack[-1]
        if type(record) is not list or len(record) != 1:
            raise CheckpointError("the metadata tries to change something that has no state; it is hostile")
        if type(state) is Table:
            record.extend(state)
        else:
            record.append(state)
        return at + 1

    def reduce(self, at: int) -> int:
        """REDUCE: note a call."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if function is SIZE:
            return self._push(made_size(arguments), at + 1)
        is_empty = function is ORDERED and type(arguments) is tuple and not arguments
        return self._push(Table() if is_empty else Call((function, arguments)), at + 1)

    def table(self, at: int) -> int:
        """EMPTY_DICT."""
        return self._push(Table(), at + 1)

    def array(self, at: int) -> int:
        """EMPTY_LIST."""
        return self._push(Array(), at + 1)

    def append(self, at: int) -> int:
        """APPEND."""
        value = self.stack.pop()
        self.stack[-1].append(value)
        return at + 1

    def extend(self, at: int) -> int:
        """APPENDS."""
        begin = self.marks.pop()
        items = self.stack[begin:]
        del self.stack[begin:]
        self.stack[-1].extend(items)
        return at + 1

    def set_item(self, at: int) -> int:
        """SETITEM."""
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1].extend((key, value))
        return at + 1

    def text(self, at: int) -> int:
        """BINUNICODE."""
        end: int = at + 5 + _u4(self.data, at)[0]
        self.stack.append(self.data[at + 5 : end].decode("utf-8", "surrogatepass"))
        return end

    def long(self, at: int) -> int:
        """LONG1."""
        size = self.data[at + 1]
        if size > _LONGEST:
            raise CheckpointError(f"the metadata has a number of {size} bytes, which no metadata has")
        self.stack.append(int.from_bytes(self.data[at + 2 : at + 2 + size], "little", signed=True))
        return at + 2 + size

    def double(self, at: int) -> int:
        """BINFLOAT."""
        self.stack.append(_f8(self.data, at)[0])
        return at + 9

    def lines(self, at: int) -> int:
        """GLOBAL."""
        found = _LINES.match(self.data, at)
        if found is None:
            raise CheckpointError("the metadata is not an intact pickle: it has a damaged name")
        self.stack.append(named(found[1].decode(), found[2].decode()))
        return found.end()

    def by_name(self, at: int) -> int:
        """STACK_GLOBAL."""
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(named(module, name))
        return at + 1

    def protocol(self, at: int) -> int:
        """PROTO."""
        if not 2 <= self.data[at + 1] <= 5:
            raise CheckpointError(
                f"the metadata is a pickle of protocol {self.data[at + 1]}, which torch does not write"
            )
        return at + 2

    def frame(self, at: int) -> int:
        """FRAME, which only says how much to read ahead."""
        return at + 9


_RARE: dict[int, Callable[[_Machine, int], int]] = {
    0x71: _Machine.put,
    0x72: _Machine.put,
    0x70: _Machine.put,
    0x85: _Machine.tuple_of,
    0x86: _Machine.tuple_of,
    0x87: _Machine.tuple_of,
    0x81: _Machine.new,
    0x62: _Machine.build,
    0x52: _Machine.reduce,
    0x7D: _Machine.table,
    0x5D: _Machine.array,
    0x61: _Machine.append,
    0x65: _Machine.extend,
    0x73: _Machine.set_item,
    0x58: _Machine.text,
    0x8A: _Machine.long,
    0x47: _Machine.double,
    0x63: _Machine.lines,
    0x93: _Machine.by_name,
    0x80: _Machine.protocol,
    0x95: _Machine.frame,
}


def _refuse(machine: _Machine, at: int) -> int:
    raise CheckpointError(
        f"the metadata has the instruction {machine.data[at]:#04x} at byte {at}, which no metadata consists of; "
        "it was not loaded"
    )
