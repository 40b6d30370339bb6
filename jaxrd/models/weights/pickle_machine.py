"""The machine that pickles are programs of, without Python's objects.

It knows the opcodes of protocols 0 to 5. A name is looked up in a table of stand-ins, which are functions of this package, and
nothing else is ever called, imported or given attributes; a name outside the table becomes an opaque mark.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import Any

# A checkpoint with its optimizer's state takes some 100,000 opcodes; a file that needs more than this is an attack.
_MOST_OPCODES = 20_000_000
_MOST_COPIED = 20_000_000  # elements that stand-ins have copied: each copy costs a file only a few bytes


class Damaged(Exception):
    """What is wrong with a file's content, without the file's name; `reading` makes the one line of it."""


class NotRead(Exception):
    """What a sound file holds that is not read here; `reading` makes the one line of it."""


class StandIn:
    """What a name in a pickle stands for here: a function of this package, which the machine calls, or only the name."""

    __slots__ = ("name", "call")

    def __init__(self, name: str, call: Callable | None = None):
        self.name, self.call = name, call


class Buildable:
    """What takes a state by `build(state)`: only this package's own objects do."""

    __slots__ = ()


class Refused(Buildable):
    """A name that is not in the table, or an object made by calling it. It takes everything and does nothing."""

    __slots__ = ("name", "is_module")

    def __init__(self, name: str):
        self.name, self.is_module = name, False

    def build(self, state):
        """Notes the state by which a torch.nn.Module is known, whatever its class is called."""
        self.is_module |= isinstance(state, dict) and {"_parameters", "_modules"} <= state.keys()


Table = Mapping[tuple[str, str], StandIn]


class Machine:
    """The pickle machine: a stack, marks on it, and a memo."""

    def __init__(self, table: Table, persistent_load: Callable[[Any], Any] | None):
        self.table, self.persistent_load = table, persistent_load
        self.refused: list[Refused] = []
        self.instances: list[Refused] = []
        self.stack: list = []
        self.outer: list[list] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def run(self, file) -> Any:
        """Returns the object on top of the stack when the pickle stops."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count > _MOST_OPCODES:
                raise Damaged(f"its pickle has more than {_MOST_OPCODES} instructions")
            name = opcode.name
            if name in _LITERALS:
                self.push(bytes(argument) if isinstance(argument, bytearray) else argument)
            elif name in _CONSTANTS:
                self.push(_CONSTANTS[name])
            elif name not in _IGNORED:
                _OPERATIONS[name](self, argument)
        return self.stack.pop()

    def push(self, value) -> None:
        """Puts an object on the stack."""
        self.stack.append(value)

    def pop_to_mark(self) -> list:
        """Returns what lies above the last mark, and removes both."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def find(self, module: str, name: str) -> StandIn | Refused:
        """Returns the stand-in of a name, or an opaque mark where it has none."""
        found = self.table.get((module, name))
        if found is None:
            found = Refused(f"{module}.{name}")
            self.refused.append(found)
        return found

    def call(self, function, arguments) -> Any:
        """Returns what a stand-in makes of its arguments."""
        if isinstance(function, Refused):
            self.instances.append(Refused(function.name))
            self.instances[-1].is_module = function.is_module
            return self.instances[-1]
        if not isinstance(function, StandIn) or function.call is None or not isinstance(arguments, tuple):
            raise Damaged("its pickle calls what is no function")
        made = function.call(*arguments)
        if isinstance(made, (str, bytes, list, tuple, dict)):
            self.copied += len(made)
            if self.copied > _MOST_COPIED:
                raise Damaged(f"its pickle copies more than {_MOST_COPIED} elements")
        return made

    def append(self, target, items) -> None:
        """Appends to a list."""
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Refused):
            raise Damaged("its pickle appends to what is no list")

    def update(self, target, items) -> None:
        """Sets entries of a dictionary from [key, value, key, value, ...]."""
        if isinstance(target, Refused):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise Damaged("its pickle sets entries of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def build(self, target, state) -> None:
        """Hands a state to an object. Attributes of a dictionary, such as a state_dict's _metadata, are left out."""
        if isinstance(target, Buildable):
            target.build(state)
        elif not isinstance(target, dict):
            raise Damaged("its pickle changes what cannot be changed")


def _get(machine, index):
    machine.push(machine.memo[index])


def _put(machine, index):
    machine.memo[index] = machine.stack[-1]


def _memoize(machine, _):
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _mark(machine, _):
    machine.outer.append(machine.stack)
    machine.stack = []


def _pop(machine, _):
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_to_mark()


def _dict(machine, _):
    items, result = machine.pop_to_mark(), {}
    machine.update(result, items)
    machine.push(result)


def _short_tuple(machine, length):
    items = tuple(machine.stack[-length:])
    if len(items) != length:
        raise Damaged("its pickle takes from an empty stack")
    del machine.stack[-length:]
    machine.push(items)


def _append(machine, _):
    item = machine.stack.pop()
    machine.append(machine.stack[-1], [item])


def _appends(machine, _):
    items = machine.pop_to_mark()
    machine.append(machine.stack[-1], items)


def _set_item(machine, _):
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.update(machine.stack[-1], [key, value])


def _set_items(machine, _):
    items = machine.pop_to_mark()
    machine.update(machine.stack[-1], items)


def _global(machine, argument):
    machine.push(machine.find(*argument.split(" ", 1)))


def _stack_global(machine, _):
    name, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise Damaged("its pickle asks for a name that is no text")
    machine.push(machine.find(module, name))


def _reduce(machine, _):
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.push(machine.call(function, arguments))


def _new_object_with_keywords(machine, _):
    keywords = machine.stack.pop()
    if keywords != {}:
        machine.refused.append(Refused("keyword arguments"))
    _reduce(machine, None)


def _instance(machine, argument):
    arguments = tuple(machine.pop_to_mark())
    machine.push(machine.call(machine.find(*argument.split(" ", 1)), arguments))


def _object(machine, _):
    function, *arguments = machine.pop_to_mark()
    machine.push(machine.call(function, tuple(arguments)))


def _build(machine, _):
    state = machine.stack.pop()
    machine.build(machine.stack[-1], state)


def _persistent(machine, _):
    if machine.persistent_load is None:
        raise Damaged("its pickle refers to records outside it, where there can be none")
    machine.push(machine.persistent_load(machine.stack.pop()))


_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES "
    "BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split())
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_IGNORED = frozenset(["PROTO", "FRAME", "STOP"])
# Of the remaining opcodes, PERSID, EXT* and NEXT_BUFFER speak of what only the process that pickled has. No entry: damaged.
_OPERATIONS = {
    "GET": _get, "BINGET": _get, "LONG_BINGET": _get,
    "PUT": _put, "BINPUT": _put, "LONG_BINPUT": _put, "MEMOIZE": _memoize,
    "MARK": _mark, "POP": _pop, "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "FROZENSET": lambda machine, _: machine.push(machine.pop_to_mark()),
    "TUPLE1": lambda machine, _: _short_tuple(machine, 1),
    "TUPLE2": lambda machine, _: _short_tuple(machine, 2),
    "TUPLE3": lambda machine, _: _short_tuple(machine, 3),
    "DICT": _dict, "APPEND": _append, "APPENDS": _appends, "ADDITEMS": _appends,
    "SETITEM": _set_item, "SETITEMS": _set_items,
    "GLOBAL": _global, "STACK_GLOBAL": _stack_global, "REDUCE": _reduce, "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_object_with_keywords, "INST": _instance, "OBJ": _object, "BUILD": _build,
    "BINPERSID": _persistent, "READONLY_BUFFER": lambda machine, _: None,
}


def checked_key(key) -> Any:
    """Returns a key of a dictionary; deeper tuples are refused, because to hash them is to recurse in C."""
    for part in key if isinstance(key, tuple) else (key,):
        if not isinstance(part, (str, bytes, int, float, complex, Refused, type(None))):
            raise Damaged(f"its pickle has a dictionary with a key of type {type(part).__name__}")
    return key
