"""PyTorch and safetensors files: what PyTorch writes is read without it, what is written PyTorch reads, and a
file that would run code is refused with nothing of it run."""

import collections
import contextlib
import copyreg
import datetime
import importlib
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch_pickles import (
    FORMATS,
    MAGIC,
    ORDERED,
    Call,
    Encoder,
    Name,
    New,
    Raw,
    Storage,
    archive,
    legacy_bytes,
    module,
    parameter,
    tensor,
    zip_bytes,
)

from repopt_jax.interop import checkpoints, pickles
from repopt_jax.interop.files import read_tensors, write_safetensors, write_torch

pytestmark = pytest.mark.once

SIX = np.arange(6, dtype=np.float32).reshape(2, 3)
TWO = np.array([7, 8])


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        array = np.asarray(array)
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert np.array_equal(found[name].astype(array.dtype).tobytes(), array.tobytes()), name


@pytest.fixture
def no_torch(monkeypatch):
    """`import torch` fails for the length of a test."""
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture(params=list(FORMATS))
def written(request, tmp_path):
    """A function that writes a value in one of PyTorch's formats."""

    def write(value, **options):
        file = tmp_path / "file.pth"
        file.write_bytes(FORMATS[request.param](value, **options))
        return file

    return write


@pytest.mark.usefixtures("no_torch")
class TestReading:
    def test_a_state_dict(self, written):
        half = np.array([1.5, -2], np.float16)
        value = {"a.weight": SIX, "p": parameter(SIX), "n": np.array(3), "e": np.empty((0, 2), np.float32)}
        found = read_tensors(written(value | {"half": half, "epoch": 3}))
        assert_same(
            found,
            {"a.weight": SIX, "p": SIX, "n": np.array(3), "e": np.empty((0, 2), np.float32), "half": half},
        )
        assert not any(array.flags.writeable for array in found.values() if array.size)

    def test_views_strides_and_shared_storages(self, written):
        base = Storage("7", "FloatStorage", 12, np.arange(12, dtype=np.float32).tobytes())
        whole = np.arange(12, dtype=np.float32)
        found = read_tensors(
            written(
                {
                    "tail": tensor(base, 9, (3,), (1,)),
                    "transposed": tensor(base, 0, (4, 3), (1, 4)),
                    "every other": tensor(base, 1, (5,), (2,)),
                    "expanded": tensor(base, 3, (2, 5), (0, 1)),
                }
            )
        )
        assert_same(
            found,
            {
                "tail": whole[9:],
                "transposed": whole.reshape(3, 4).T,
                "every other": whole[1:10:2],
                "expanded": np.stack([whole[3:8]] * 2),
            },
        )
        assert np.shares_memory(found["tail"], found["transposed"])

    def test_views_of_the_oldest_files(self, tmp_path):
        content = np.arange(10, dtype=np.float32).tobytes()
        value = {"v": tensor(Storage("1", "FloatStorage", 10, content, ("2", 4, 5)), 1, (2, 2), (2, 1))}
        (tmp_path / "old.pth").write_bytes(legacy_bytes(value))
        assert_same(read_tensors(tmp_path / "old.pth"), {"v": np.array([[5, 6], [7, 8]], np.float32)})

    def test_an_ordered_dict_of_python_2(self, written):
        pairs = Call(Name("collections", "OrderedDict"), ([["a", SIX], ["b", TWO]],))
        assert_same(read_tensors(written(pairs)), {"a": SIX, "b": TWO})

    def test_attributes_of_the_dict_and_of_parameters(self, written):
        """`_metadata` of a state dict, and parameters and subclasses with attributes of their own."""
        rebuilt = Name("torch._utils", "_rebuild_tensor_v2")
        stored = Storage("9", "LongStorage", 2, TWO.tobytes())
        value = {
            "a": Call(
                Name("torch._utils", "_rebuild_parameter_with_state"), (SIX, True, ORDERED, {"tag": 1})
            ),
            "b": Call(
                Name("torch._tensor", "_rebuild_from_type_v2"),
                (rebuilt, Name("some", "Tensor"), (stored, 0, (2,), (1,), False, ORDERED), {}),
            ),
        }
        file = written(
            {"state_dict": value, "extra": New(Name("collections", "OrderedDict"), (), {"_metadata": 1})}
        )
        assert_same(read_tensors(file), {"a": SIX, "b": TWO})

    def test_types_without_a_storage_class(self, tmp_path):
        """float8 and unsigned integers are bytes with a type beside them."""
        raw = Storage("0", "UntypedStorage", 6, np.array([1, 2, 65535], np.uint16).tobytes())
        v3 = Name("torch._utils", "_rebuild_tensor_v3")
        arguments = (raw, 1, (2,), (1,), False, ORDERED, Name("torch", "uint16"))
        (tmp_path / "file.pth").write_bytes(zip_bytes({"u": Call(v3, arguments)}))
        assert_same(read_tensors(tmp_path / "file.pth"), {"u": np.array([2, 65535], np.uint16)})
        (tmp_path / "file.pth").write_bytes(
            zip_bytes({"u": Call(v3, (*arguments[:-1], Name("torch", "qint8")))})
        )
        with pytest.raises(ValueError, match=r"a tensor of type torch\.qint8, which is not supported"):
            read_tensors(tmp_path / "file.pth")

    def test_the_other_byte_order(self, tmp_path):
        values = {
            "FloatStorage": np.array([1, -2.5], np.float32),
            "ComplexFloatStorage": np.array([1 + 2j, 3], np.complex64),
        }
        value = {
            kind: tensor(
                Storage(kind, kind, 2, array.astype(array.dtype.newbyteorder(">")).tobytes()), 0, (2,), (1,)
            )
            for kind, array in values.items()
        }
        (tmp_path / "file.pth").write_bytes(zip_bytes(value, byteorder=b"big"))
        assert_same(read_tensors(tmp_path / "file.pth"), values)

    def test_a_value_still_to_be_conjugated(self, written):
        stored = Storage("0", "FloatStorage", 1, bytes(4))
        with pytest.raises(ValueError, match="still to be conjugated or negated"):
            read_tensors(written({"a": tensor(stored, 0, (1,), (1,), {"conj": True})}))
        assert list(read_tensors(written({"a": tensor(stored, 0, (1,), (1,), {"conj": False})}))) == ["a"]


@pytest.mark.usefixtures("no_torch")
class TestChoosing:
    def test_the_order_of_entries(self, written):
        order = ("model", "state_dict", "model_state_dict", "params", "ema")
        value = {"epoch": 3, "optimizer": {"state": {0: {"momentum": SIX}}}}
        for number, name in reversed(list(enumerate(order))):
            value[name] = {"w": np.array([number])}
            assert_same(read_tensors(written(value)), {"w": np.array([number])})
        for number, name in enumerate(order):
            assert_same(read_tensors(written(value), key=name), {"w": np.array([number])})

    def test_an_entry_without_tensors_is_passed_over(self, written):
        value = {"model": None, "state_dict": {}, "params": {"lr": 0.1}, "ema": {"w": SIX}}
        assert_same(read_tensors(written(value)), {"w": SIX})

    def test_entries_within_entries(self, written):
        value = {"model": {"state_dict": {"w": SIX}}, "nets": {"g": {"w": TWO}}}
        assert_same(read_tensors(written(value)), {"w": SIX})
        assert_same(read_tensors(written(value), key="nets/g"), {"w": TWO})

    def test_an_unknown_entry_is_not_guessed(self, written):
        """Nor are loose tensors beside it taken for the network."""
        file = written({"generator": {"w": SIX}, "critic": {"w": TWO}, "best": np.array(3), "epoch": 1})
        with pytest.raises(
            ValueError, match=r"file\.pth holds no tensors where.*one of 'generator', 'critic'$"
        ):
            read_tensors(file)
        assert_same(read_tensors(file, key="critic"), {"w": TWO})
        with pytest.raises(
            ValueError, match=r"no entry 'net' .*the entries are 'generator', 'critic', 'best'"
        ):
            read_tensors(file, key="net")
        with pytest.raises(ValueError, match=r"holds no tensors under 'epoch'$"):
            read_tensors(file, key="epoch")

    def test_prefixes_of_wrappers(self, written):
        assert_same(
            read_tensors(written({"module._orig_mod.a": SIX, "module._orig_mod.b": TWO})),
            {"a": SIX, "b": TWO},
        )
        assert list(read_tensors(written({"module.a": SIX, "b": TWO}))) == ["module.a", "b"]

    def test_a_whole_module_of_a_package_that_is_not_here(self, written):
        layer = module(
            "nowhere.layers.Conv", {"weight": SIX, "bias": None}, act=New(Name("torch.nn", "SiLU"))
        )
        norm = module(
            "torch.nn.BatchNorm2d", {"weight": TWO}, {"running_mean": TWO, "grid": SIX}, passing=["grid"]
        )
        block = module(
            "nowhere.layers.Block", {"scale": TWO}, None, {"conv": layer, "bn": norm, "none": None}
        )
        model = module("nowhere.yolo.Model", None, {"stride": TWO}, {"backbone": block, "0": layer})
        beside = {
            "date": Call(Name("datetime", "datetime"), ("2022",)),
            "folder": Call(Name("pathlib", "PosixPath"), ("a", "b")),
            "best": Call(
                Name("numpy.core.multiarray", "scalar"), (Call(Name("numpy", "dtype"), ("f8",)), "x")
            ),
            "args": New(Name("argparse", "Namespace"), (), {"lr": 0.1}),
        }
        expected = {
            "stride": TWO,
            "backbone.scale": TWO,
            "backbone.conv.weight": SIX,
            "backbone.bn.weight": TWO,
            "backbone.bn.running_mean": TWO,
            "0.weight": SIX,
        }
        assert_same(read_tensors(written({"model": model, "ema": None, "epoch": 3, **beside})), expected)
        assert_same(read_tensors(written(model)), expected)
        assert_same(
            read_tensors(written(module("torch.nn.DataParallel", modules={"module": model}))), expected
        )


class Hostile:
    """What a pickle of it does when it is loaded the usual way."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (os.system, (f"touch {self.canary}",))


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def hostile_values(canary):
    """Values whose pickles run something: name -> (value, what the message names)."""
    touch = f"touch {canary}"
    python = f"open({str(canary)!r}, 'w')"
    system, reduced = Name("posix", "system"), Call(Name("posix", "system"), (touch,))
    protocol_4 = pickle.dumps(Hostile(canary), 4)[2 + 9 : -1]  # without its header and frame
    rebuild = Name("torch._utils", "_rebuild_tensor_v2")
    os_system = Call(Name("builtins", "getattr"), (Name("os", "path"), "os"))
    return {
        "os.system": (reduced, "calls posix.system"),
        "eval": ({"w": SIX, "x": Call(Name("builtins", "eval"), (python,))}, "calls builtins.eval"),
        "eval of Python 2": (Call(Name("__builtin__", "eval"), (python,)), "calls __builtin__.eval"),
        "exec": (Call(Name("builtins", "exec"), (python,)), "calls builtins.exec"),
        "protocol 4": ({"model": Raw(protocol_4)}, "calls posix.system"),
        "subprocess": (
            Call(Name("subprocess", "Popen"), (["touch", str(canary)],)),
            "calls subprocess.Popen",
        ),
        "in a module's state": (
            {"model": module("nowhere.Model", {"w": SIX}, hook=reduced)},
            "calls posix.system",
        ),
        "for a module's state": (
            New(Name("nowhere", "Model"), (), Call(Name("builtins", "exec"), (python,))),
            "calls builtins.exec",
        ),
        "in an optimizer's state": (
            {"model": {"w": SIX}, "optimizer": {"state": [reduced]}},
            "calls posix.system",
        ),
        "as arguments of an allowed call": (
            Call(Name("collections", "OrderedDict"), ([["a", reduced]],)),
            "calls posix",
        ),
        "through an allowed call": (
            Call(Name("torch._tensor", "_rebuild_from_type_v2"), (system, None, (touch,), {})),
            "calls posix.system",
        ),
        "as a storage": (
            Raw(b"(" + text("module") + b"cposix\nsystem\nNNtQ(" + text(touch) + b"tR"),
            "calls posix.system",
        ),
        "a call of an unknown class": (Call(Name("nowhere", "Model"), ()), "calls nowhere.Model"),
        "a call of a called thing": (Call(os_system, (touch,)), "calls builtins.getattr"),
        "a call of an object": (Call(New(Name("nowhere", "Model")), (touch,)), "calls Record"),
        "INST": (Raw(b"(" + text(touch) + b"iposix\nsystem\n"), "calls posix.system"),
        "OBJ": (Raw(b"(cposix\nsystem\n" + text(touch) + b"o"), "calls posix.system"),
        "NEWOBJ of no class": (New(reduced, (touch,)), "calls posix.system"),
        "NEWOBJ of an object": (New([1], (touch,)), "makes an object of list"),
        "attributes of a function": (
            Raw(b"cposix\nsystem\n}(" + text("__name__") + text("x") + b"ub"),
            "of posix.system",
        ),
        "slots of our functions": (
            Raw(b"ctorch._utils\n_rebuild_tensor_v2\n(N}(" + text("__defaults__") + b")utb"),
            f"attributes of {rebuild.module}.{rebuild.name}",
        ),
        "attributes of a class": (Raw(b"cnowhere\nModel\n}b"), "attributes of nowhere.Model"),
        "the extension registry": (Raw(b"\x82\xf0(" + text(touch) + b"tR"), "uses EXT1"),
        "copyreg": (
            Call(Name("copyreg", "_reconstructor"), (system, Name("builtins", "object"), None)),
            "calls copyreg",
        ),
        "copyreg of Python 2": (
            Call(Name("copy_reg", "add_extension"), ("posix", "system", 5)),
            "calls copy_reg",
        ),
        "partial": (Call(Name("functools", "partial"), (system, touch)), "calls functools.partial"),
        "an import": (
            Call(Name("importlib", "import_module"), ("antigravity",)),
            "calls importlib.import_module",
        ),
        "a textual persistent id": (Raw(b"Pstorage\n"), "uses PERSID"),
        "a name that would break the message": (Call(Name("a\rb", "c" * 500), ()), "calls 'a"),
    }


HOSTILE = tuple(hostile_values("canary"))


class TestHostile:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_refused_and_nothing_runs(self, name, written, tmp_path, monkeypatch):
        canary = tmp_path / "canary"
        value, said = hostile_values(canary)[name]
        monkeypatch.setitem(copyreg._extension_cache, 0xF0, os.system)  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(ValueError, match=r"file\.pth is refused") as error:
            read_tensors(written({"w": SIX, "value": value}))
        message = str(error.value)
        assert said in message
        assert message.isprintable()
        assert len(message) < len(str(tmp_path)) + 300
        assert not canary.exists()

    @pytest.mark.parametrize("where", ["start", "machine", "keys"])
    def test_in_the_other_pickles_of_an_old_file(self, where, tmp_path):
        canary = tmp_path / "canary"
        call = Call(Name("posix", "system"), (f"touch {canary}",))
        (tmp_path / "file.pth").write_bytes(legacy_bytes({"w": SIX}, **{where: call}))
        with pytest.raises(ValueError, match=r"file\.pth is refused: it calls posix\.system"):
            read_tensors(tmp_path / "file.pth")
        assert not canary.exists()

    def test_a_plain_pickle(self, tmp_path):
        """As a control: the usual way of loading does run it."""
        canary = tmp_path / "canary"
        for protocol in range(2, 6):
            (tmp_path / "file.pth").write_bytes(pickle.dumps(Hostile(canary), protocol))
            with pytest.raises(ValueError, match=r"file\.pth is refused: it calls posix\.system"):
                read_tensors(tmp_path / "file.pth")
        assert not canary.exists()
        pickle.loads((tmp_path / "file.pth").read_bytes())
        assert canary.exists()

    def test_objects_of_any_class_are_inert(self, written, tmp_path):
        """Made without a constructor, given state without `__setstate__`: the names alone are kept."""
        canary = tmp_path / "canary"
        value = {
            "w": SIX,
            "process": New(Name("subprocess", "Popen"), (["touch", str(canary)],)),
            "state": New(
                Name("logging", "Handler"), (), {"__class__": 1, "__setstate__": Name("os", "system")}
            ),
            "default": Call(Name("collections", "defaultdict"), (Name("posix", "system"),)),
            "items": Raw(b"cnowhere\nDict\n)\x81(" + text("a") + b"\x88u"),
            "elements": Raw(b"cnowhere\nList\n)\x81(\x88\x89e"),
        }
        assert_same(read_tensors(written(value)), {"w": SIX})
        assert not canary.exists()


class TestBombs:
    """What claims to be larger than the file is refused before anything is allocated for it."""

    @pytest.mark.parametrize(
        "broken",
        [
            tensor(Storage("0", "FloatStorage", 2**40, bytes(8)), 0, (2**40,), (1,)),
            tensor(Storage("0", "FloatStorage", 2, bytes(8)), 0, (3,), (1,)),
            tensor(Storage("0", "FloatStorage", 2, bytes(8)), 1, (2,), (1,)),
            tensor(Storage("0", "FloatStorage", 2, bytes(8)), -1, (2,), (1,)),
            tensor(Storage("0", "FloatStorage", 2, bytes(8)), 1, (2,), (-1,)),
            tensor(Storage("0", "FloatStorage", 2, bytes(8)), 0, (2**40,), (0,)),
            tensor(Storage("0", "FloatStorage", 2, bytes(8)), 0, (1,) * 2000, (1,) * 2000),
            tensor(Storage("0", "FloatStorage", 2, None), 0, (2,), (1,)),
            tensor(Storage("0", "FloatStorage", -2, bytes(8)), 0, (2,), (1,)),
            Raw(b"\x8br\xff\xff\xff\x7f"),
            Raw(b"h\x05"),
            Raw(b"0" * 50),
        ],
    )
    def test_sizes(self, broken, written):
        with pytest.raises(ValueError, match=r"file\.pth is truncated or damaged"):
            read_tensors(written({"w": broken}))

    def test_a_far_memo_index_costs_nothing(self, written):
        assert_same(read_tensors(written({"w": SIX, "x": Raw(b"Nr\xff\xff\xff\x7f")})), {"w": SIX})

    def test_nested_keys_and_modules(self, written):
        deep = Raw(b"}(" + b"N" + b"\x85" * 100_000 + b"Nu")  # hashing it would overflow the stack
        assert_same(read_tensors(written({"w": SIX, "x": deep})), {"w": SIX})
        endless = Raw(b"cnowhere\nModel\n)\x81q\x01}(" + text("_modules") + b"}(" + text("a") + b"h\x01uub")
        with pytest.raises(ValueError, match="modules are nested without end"):
            read_tensors(written({"model": endless}))
        layers = b"cnowhere\nM\n)\x81q\x00}(" + text("_modules") + b"}ub0"
        for n in range(1, 40):  # 2^40 paths
            child = b"h" + bytes([n - 1])
            inner = b"}(" + text("a") + child + text("b") + child + b"u"
            layers += b"cnowhere\nM\n)\x81q" + bytes([n]) + b"}(" + text("_modules") + inner + b"ub0"
        with pytest.raises(ValueError, match="modules are nested without end"):
            read_tensors(written({"model": Raw(layers + b"h\x27")}))

    def test_a_module_within_itself_is_not_entered(self, written, monkeypatch):
        """Its name would be written down once for each level: a hundred times here, of a megabyte each."""
        monkeypatch.setattr(checkpoints, "_MAX_CHARACTERS", 10_000)
        name = "n" * 1000
        tensors = Encoder().encode({"w": SIX})
        state = text("_parameters") + tensors + text("_modules") + b"}(" + text(name) + b"h\x01u"
        endless = Raw(b"cnowhere\nModel\n)\x81q\x01}(" + state + b"ub")
        with pytest.raises(ValueError, match="modules are nested without end"):
            read_tensors(written({"model": endless}))

    @pytest.mark.parametrize("limit", ["_MAX_NAMES", "_MAX_CHARACTERS"])
    def test_names_of_modules_are_bounded(self, limit, written, monkeypatch):
        layer = module("nowhere.Layer", {"weight": SIX}, {"n": TWO}, passing=["p"])
        model = {"model": module("nowhere.Model", None, None, {"a": layer, "b": layer})}
        expected = {"a.weight": SIX, "a.n": TWO, "b.weight": SIX, "b.n": TWO}
        total = {"_MAX_NAMES": 2 + 2 * 3, "_MAX_CHARACTERS": 2 + 2 * len("a.weighta.n")}[limit]
        monkeypatch.setattr(checkpoints, limit, total)
        assert_same(read_tensors(written(model)), expected)
        monkeypatch.setattr(checkpoints, limit, total - 1)
        with pytest.raises(ValueError, match="its modules hold too many names"):
            read_tensors(written(model))

    def test_a_checkpoint_within_itself(self, written, monkeypatch):
        """Looked at once for each depth, not once for each of the 5^4 ways to it."""
        looked = []
        monkeypatch.setattr(checkpoints, "_is_module", lambda value: looked.append(value))
        names = b"".join(text(name) + b"h\x01" for name in checkpoints.NESTED)
        with pytest.raises(ValueError, match="holds no tensors"):
            read_tensors(written(Raw(b"}q\x01(" + names + b"u")))
        assert len(looked) < 20

    def test_prefixes_of_wrappers_are_taken_off_at_once(self):
        name = "module." * 150_000  # copied for each of them, it would be 80 GB
        assert checkpoints.without_wrappers({f"{name}a": 1, f"{name}b": 2}) == {"a": 1, "b": 2}

    @pytest.mark.parametrize("key", [Raw(b"N" + b"\x85" * 100_000), (1, 2), 7])
    def test_keys_of_old_storages(self, key, tmp_path):
        """Hashing a deeply nested tuple overflows the stack, and one of shared tuples takes for ever."""
        (tmp_path / "file.pth").write_bytes(legacy_bytes({"w": SIX}, keys=[key]))
        with pytest.raises(ValueError, match="the keys of its storages are not strings"):
            read_tensors(tmp_path / "file.pth")

    # As text, n pairs of the one before are of length 2^n.
    SHARED = Raw(b"N" + b"2\x86" * 15)

    @pytest.mark.parametrize(
        ("broken", "said"),
        [
            (Raw(text("m") + SHARED.code + b"\x93"), "a global without a proper name"),
            (Raw(SHARED.code + text("m") + b"\x93"), "a global without a proper name"),
            (Name("m", "n" * 1000), "a global without a proper name"),
            (
                Raw(Encoder().encode(("storage", Name("torch", "FloatStorage"), SHARED, "cpu", 2)) + b"Q"),
                "an unknown kind of persistent id",
            ),
            (Raw(Encoder().encode(("storage", *[None] * 20)) + b"Q"), "a persistent id that is too long"),
            (
                Call(
                    Name("torch._utils", "_rebuild_tensor_v3"),
                    (Storage("0", "UntypedStorage", 4, bytes(4)), 0, (1,), (1,), False, ORDERED, SHARED),
                ),
                "holds a tensor of type tuple, which is not supported",
            ),
        ],
    )
    def test_only_texts_are_names(self, broken, said, written):
        with pytest.raises(ValueError, match=said) as error:
            read_tensors(written({"w": broken}))
        assert len(str(error.value)) < 300

    def test_messages_do_not_expand(self, written):
        entries = Encoder().encode({"a": {"w": SIX}})[2:-1] + self.SHARED.code + b"}(" + text("w")
        file = written(Raw(b"}(" + entries + Encoder().encode(SIX) + b"uu"))
        with pytest.raises(ValueError, match=r"give `key`, one of 'a'$"):
            read_tensors(file)
        with pytest.raises(ValueError, match=r"the entries are 'a'$"):
            read_tensors(file, key="b")
        assert repr(pickles.load(b"}(" + self.SHARED.code + b"Nu.", "file")) == "{Record: None}"

    def test_names_of_modules_do_not_expand(self, tmp_path):
        six = Encoder().encode(SIX)  # the storage "0", which `stored` puts into the file
        model = module("nowhere.Model")
        model.state["_parameters"] = Raw(b"}(" + self.SHARED.code + six + text("w") + six + b"u")
        (tmp_path / "file.pth").write_bytes(zip_bytes({"model": model, "stored": SIX}))
        assert_same(read_tensors(tmp_path / "file.pth"), {"w": SIX})

    @pytest.mark.parametrize(
        ("numel", "offset", "length", "step", "said"),
        [
            (2**63, 0, 2, 1, "the size of a storage"),
            (2, 2**63, 1, 1, "a tensor's shape, strides, offset or flags"),
            (2, 0, 2**63, 0, "a tensor's shape, strides, offset or flags"),
            (2, 0, 1, 2**63, "a tensor's shape, strides, offset or flags"),
        ],
    )
    def test_integers_of_more_than_64_bits(self, numel, offset, length, step, said):
        """They are refused as such, before anything is multiplied by them."""
        value = tensor(Storage("0", "FloatStorage", numel, None), offset, (length,), (step,))
        for legacy in (False, True):
            with pytest.raises(ValueError, match=said):
                pickles.load(Encoder(legacy=legacy).pickle(value), "file")

    def test_flags_that_many_tensors_share(self, written):
        flags = {f"{n}": False for n in range(40)}
        with pytest.raises(ValueError, match="a tensor's shape, strides, offset or flags"):
            read_tensors(
                written({"w": tensor(Storage("0", "FloatStorage", 2, bytes(8)), 0, (2,), (1,), flags)})
            )

    def test_keys_that_collide(self):
        """Integers and floats that all have the hash 0, or few hashes."""
        large = {n * (2**61 - 1): None for n in range(-100, 100)}
        floats = {2.0 ** (61 * n): None for n in range(16)}
        for keys in (large, floats):
            loaded = pickles.load(Encoder().pickle(keys), "file")
            assert len(loaded) == len(keys)
            assert [key for key in loaded if isinstance(key, (int, float))] == ([0] if 0 in keys else [])
        plain = {0: 0, -1: 1, 2**60: 2, "a": 3, None: 4}
        assert pickles.load(Encoder().pickle(plain), "file") == plain
        for index in (b"2305843009213693951", b"4294967296", b"-1"):
            with pytest.raises(ValueError, match="a memo index out of range"):
                pickles.load(b"Np" + index + b"\n.", "file")
        assert pickles.load(b"Np4294967295\n.", "file") is None

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_compressed_archives_that_claim_equal_sizes(self, method, tmp_path):
        """BZIP2 and LZMA expand all that they are given, whatever the directory says of its size."""
        content = bytearray(archive({"archive/data.pkl": bytes(1_000_000)}, method))
        entry = content.index(b"PK\x01\x02")
        content[entry + 24 : entry + 28] = content[entry + 20 : entry + 24]
        (tmp_path / "file.pth").write_bytes(content)
        with zipfile.ZipFile(tmp_path / "file.pth") as file:
            assert file.infolist()[0].file_size == file.infolist()[0].compress_size
        with pytest.raises(ValueError, match=r"file\.pth holds compressed or overlapping entries"):
            read_tensors(tmp_path / "file.pth")

    def test_archives(self, tmp_path):
        file = tmp_path / "file.pth"
        file.write_bytes(zip_bytes({"w": np.zeros(100_000, np.float32)}, compression=zipfile.ZIP_DEFLATED))
        assert file.stat().st_size < 2000
        with pytest.raises(ValueError, match=r"file\.pth holds compressed or overlapping entries"):
            read_tensors(file)


PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)


class TestNotAFile:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "is empty$"),
            (PNG, "is not a PyTorch or safetensors file"),
            (b"epoch 3, loss 0.1", "is not a PyTorch or safetensors file"),
            (b"{}", "is not a PyTorch or safetensors file"),
            (archive({}), "is an empty archive$"),
            (archive({"a.npy": b"x"}), "is a zip archive, but not one that `torch.save` wrote"),
            (archive({"a/data.pkl": b"N.", "a/constants.pkl": b"N."}), "is a TorchScript archive"),
            (pickle.dumps({"w": 1}), "is a pickle, but not one that `torch.save` wrote$"),
            (pickle.dumps(MAGIC, 2), "is truncated or damaged"),
            (zip_bytes({"epoch": 3}), "holds no tensors$"),
            (legacy_bytes(3), "holds no tensors$"),
            (zip_bytes(module("nowhere.Model")), "holds no tensors$"),
            (b"\x02" + bytes(7) + b"{}", "holds no tensors$"),
            (b"\xff" * 7 + b"\x00{}", "is not a PyTorch or safetensors file"),
            (b"\xff" * 3 + bytes(5) + b"{}", "is truncated or damaged"),
            (b"\x09" + bytes(7) + b'{"a":[]}x', "is truncated or damaged"),
        ],
    )
    def test_one_sentence(self, content, said, tmp_path):
        file = tmp_path / "weights.pth"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"weights\.pth {said}") as error:
            read_tensors(file)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < len(str(file)) + 200

    def test_folders_and_missing_files(self, tmp_path):
        with pytest.raises(ValueError, match="is a folder, not a PyTorch or safetensors file"):
            read_tensors(tmp_path)
        with pytest.raises(FileNotFoundError):
            read_tensors(tmp_path / "none.pth")

    def test_cut_anywhere(self, written):
        file = written({"a": SIX, "b": {"x": 1}, "c": TWO})
        content = file.read_bytes()
        assert_same(read_tensors(file), {"a": SIX, "c": TWO})
        for end in range(1, len(content), 7):
            file.write_bytes(content[:end])
            with pytest.raises(ValueError, match=r"file\.pth is (truncated|not a)"):
                read_tensors(file)

    def test_a_cut_safetensors_file(self, tmp_path):
        file = tmp_path / "file.safetensors"
        write_safetensors(file, {"a": SIX})
        content = file.read_bytes()
        for end in range(1, len(content), 7):
            file.write_bytes(content[:end])
            with pytest.raises(ValueError, match=r"file\.safetensors is (truncated|not a)"):
                read_tensors(file)

    @given(data=st.data())
    @settings(max_examples=150, deadline=None)
    def test_changed_bytes(self, data, tmp_path_factory):
        """Whatever the bytes are, the answer is arrays or a ValueError."""
        file = tmp_path_factory.mktemp("changed") / "file.pth"
        make = data.draw(st.sampled_from(list(FORMATS.values())))
        content = bytearray(make({"model": module("a.B", {"w": SIX}, {"n": TWO}), "epoch": 1}))
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
        with contextlib.suppress(ValueError):
            assert all(isinstance(array, np.ndarray) for array in read_tensors(file).values())


SPECIAL = {
    "bf16": np.array([1.5, -3], ml_dtypes.bfloat16),
    "scalar": np.array(3, np.int64),
    "empty": np.zeros((0, 3), np.float32),
    "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "swapped": np.array([1, 2], ">i4"),
    "bool": np.array([True, False]),
    "complex": np.array([1 + 2j], np.complex64),
    "ümlaut": np.array([1], np.float16),
}
READ_BACK = SPECIAL | {"swapped": np.array([1, 2], "<i4")}
WRITERS = {"pth": write_torch, "safetensors": write_safetensors}


@pytest.mark.parametrize("kind", list(WRITERS))
class TestWriting:
    def test_what_is_written_is_read(self, kind, tmp_path):
        write, file = WRITERS[kind], tmp_path / "no ending"
        write(file, SPECIAL)
        found = read_tensors(file)
        assert_same({name: found[name] for name in READ_BACK}, READ_BACK)
        assert len(found) == len(READ_BACK)
        assert os.listdir(tmp_path) == ["no ending"]

    def test_nothing_is_overwritten(self, kind, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(FileExistsError, match="file exists: files are not overwritten"):
            WRITERS[kind](tmp_path / "file", {"a": SIX})
        assert (tmp_path / "file").read_text() == "mine"

    def test_the_home_folder(self, kind, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        WRITERS[kind]("~/file", {"a": SIX})
        assert os.listdir(tmp_path) == ["file"]
        assert_same(read_tensors("~/file"), {"a": SIX})

    def test_a_failure_leaves_nothing(self, kind, tmp_path, monkeypatch):
        def fail(*args, **kwargs):
            raise OSError("no space left on device")

        monkeypatch.setattr("safetensors.serialize_file", fail)
        monkeypatch.setattr("repopt_jax.interop.files._pickled", fail)
        with pytest.raises(OSError, match="no space left"):
            WRITERS[kind](tmp_path / "file", {"a": SIX})
        assert os.listdir(tmp_path) == []

    def test_types_that_the_format_lacks(self, kind, tmp_path):
        wrong = {"a": SIX, "b": np.array(["x"]), "c": np.array([1], np.longdouble), "d": np.array([None])}
        with pytest.raises(ValueError, match=r"`tensors` holds types that .*: b <U1, c float128, d object;"):
            WRITERS[kind](tmp_path / "file", wrong)
        assert os.listdir(tmp_path) == []

    @given(
        array=npst.arrays(
            st.sampled_from(["f4", "f2", "i8", "u1", "?"]), npst.array_shapes(min_dims=0, min_side=0)
        )
    )
    @settings(max_examples=25, deadline=None)
    def test_any_array(self, kind, array, tmp_path_factory):
        file = tmp_path_factory.mktemp("any") / "file"
        WRITERS[kind](file, {"a": array, "b": array.T})
        assert_same(read_tensors(file), {"a": array, "b": array.T})


def test_safetensors_metadata_and_key(tmp_path):
    file = tmp_path / "file"
    write_safetensors(file, {"module.a": SIX}, metadata={"made by": "a test"})
    assert b'"__metadata__":{"made by":"a test"}' in file.read_bytes()
    assert_same(read_tensors(file), {"a": SIX})
    with pytest.raises(ValueError, match="is a safetensors file, which has no entries"):
        read_tensors(file, key="model")


class TestAgainstPyTorch:
    """What PyTorch itself writes and reads."""

    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch")

    @pytest.fixture(params=[(True, 2), (True, 5), (False, 2), (False, 4)], ids=str)
    def save(self, request, torch, tmp_path):
        zipped, protocol = request.param

        def save(value):
            torch.save(
                value, tmp_path / "file", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol
            )
            return tmp_path / "file"

        return save

    def test_tensors(self, torch, save):
        base = torch.arange(12.0).reshape(3, 4)
        tensors = {
            name: torch.arange(5).to(getattr(torch, name)) for name in ("float64", "float16", "int8", "bool")
        }
        tensors |= {"t": base.t(), "v": base[1:, ::2], "p": torch.nn.Parameter(base), "s": torch.tensor(2)}
        tensors |= {"e": torch.zeros(0, 3), "x": torch.tensor([1.0]).expand(3), "c": torch.tensor([1j])}
        assert_same(read_tensors(save(tensors)), {name: t.detach().numpy() for name, t in tensors.items()})
        found = read_tensors(save({"b": torch.tensor([1.5, -3], dtype=torch.bfloat16)}))
        assert_same(found, {"b": np.array([1.5, -3], ml_dtypes.bfloat16)})

    def test_types_without_a_storage_class(self, torch, tmp_path):
        tensors = {
            "u": torch.tensor([1, 65535], dtype=torch.uint16),
            "f": torch.tensor([1.5, -3]).to(torch.float8_e4m3fn),
        }
        torch.save(tensors, tmp_path / "file")
        expected = {"u": np.array([1, 65535], np.uint16), "f": np.array([1.5, -3], ml_dtypes.float8_e4m3fn)}
        assert_same(read_tensors(tmp_path / "file"), expected)

    def test_a_checkpoint_of_a_whole_module(self, torch, save, tmp_path, monkeypatch):
        """Its class is gone when the file is read."""
        nn = torch.nn
        (tmp_path / "gone.py").write_text("import torch\nclass Net(torch.nn.Module):\n    pass\n")
        monkeypatch.syspath_prepend(tmp_path)
        net = importlib.import_module("gone").Net()
        net.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ModuleDict({"x": nn.Linear(2, 2, bias=False)})
        )
        net.scales = nn.ParameterList([nn.Parameter(torch.ones(2))])
        net.register_buffer("kept", torch.ones(2))
        net.register_buffer("dropped", torch.ones(2), persistent=False)
        net.plain = [{1, 2}, 1j, slice(1), b"x", None, net.kept.shape, torch.device("cpu"), torch.float16]
        net.plain += [np.ones(3), np.float32(2), pathlib.Path("a"), datetime.datetime(2022, 1, 1)]
        net.plain += [collections.defaultdict(list, a=[1]), collections.Counter("a")]
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        expected = {name: t.numpy() for name, t in net.half().state_dict().items()}
        file = save({"model": net, "ema": None, "optimizer": optimizer.state_dict(), "epoch": 3})
        monkeypatch.delitem(sys.modules, "gone")
        found = read_tensors(file)
        assert_same(found, expected)
        assert "dropped" not in found
        wrapped = save({"model": nn.DataParallel(nn.Linear(2, 2)).state_dict()})
        assert list(read_tensors(wrapped)) == ["weight", "bias"]

    def test_what_is_written_pytorch_reads(self, torch, tmp_path):
        write_torch(tmp_path / "file.pth", SPECIAL)
        for mapped in (False, True):
            loaded = torch.load(tmp_path / "file.pth", weights_only=True, mmap=mapped)
            assert type(loaded) is collections.OrderedDict
            assert list(loaded) == list(SPECIAL)
            for name, t in loaded.items():
                expected = READ_BACK[name]
                assert str(t.dtype).removeprefix("torch.") == expected.dtype.name
                assert tuple(t.shape) == expected.shape
                assert t.is_contiguous()
                assert t.tolist() == expected.tolist()
        write_safetensors(tmp_path / "file.safetensors", SPECIAL)
        from safetensors.torch import load_file

        again = load_file(tmp_path / "file.safetensors")
        assert all(torch.equal(again[name], t) for name, t in loaded.items())

    def test_storages_are_aligned(self, tmp_path):
        write_torch(tmp_path / "file.pth", {f"{'x' * n}": np.zeros(n, np.uint8) for n in range(1, 70)})
        with zipfile.ZipFile(tmp_path / "file.pth") as file:
            content = io.BytesIO((tmp_path / "file.pth").read_bytes()).getvalue()
            for entry in file.infolist():
                name, extra = struct.unpack_from("<HH", content, entry.header_offset + 26)
                assert (entry.header_offset + 30 + name + extra) % 64 == 0


def test_reading_imports_no_torch(tmp_path):
    write_torch(tmp_path / "file.pth", {"a": SIX})
    code = (
        "import sys; from repopt_jax.interop.files import read_tensors; read_tensors(sys.argv[1]);"
        "sys.exit('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file.pth")], check=False)
    assert run.returncode == 0


class TestKinds:
    """A file is what its whole beginning says, not its first byte."""

    HEADER = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'

    def test_safetensors_headers_of_every_length(self, tmp_path):
        """Also those whose first byte is that of a pickle (0x80) or of a zip archive ("P")."""
        file, values = tmp_path / "file.safetensors", np.array([1.5, -2], np.float32)
        for length in range(8, 4097):
            whole = length >= len(self.HEADER)
            header = (self.HEADER if whole else b"{}").ljust(length)
            file.write_bytes(length.to_bytes(8, "little") + header + (values.tobytes() if whole else b""))
            if whole:
                assert np.array_equal(read_tensors(file)["w"], values), length
            else:
                with pytest.raises(ValueError, match=r"file\.safetensors holds no tensors$"):
                    read_tensors(file)
        length = int.from_bytes(b"PK", "little")
        file.write_bytes(length.to_bytes(8, "little") + self.HEADER.ljust(length) + values.tobytes())
        assert np.array_equal(read_tensors(file)["w"], values)

    @pytest.mark.parametrize("length", [0x80, 0x0280, 0x4B50])
    def test_a_cut_header_is_no_pickle(self, length, tmp_path):
        file = tmp_path / "file.safetensors"
        file.write_bytes(length.to_bytes(8, "little") + self.HEADER)
        with pytest.raises(ValueError, match=r"file\.safetensors is truncated or damaged: .*[Hh]eader"):
            read_tensors(file)

    def test_a_name_of_75_characters(self, tmp_path):
        """The shortest header that begins as a pickle does is that of one tensor with such a name."""
        for length in range(60, 90):
            write_safetensors(tmp_path / f"{length}.safetensors", {"n" * length: TWO})
            assert_same(read_tensors(tmp_path / f"{length}.safetensors"), {"n" * length: TWO})
        firsts = {(tmp_path / f"{length}.safetensors").read_bytes()[0] for length in range(60, 90)}
        assert 0x80 in firsts, "the control: one of them begins as a pickle does"

    @given(data=st.data())
    @settings(max_examples=200, deadline=None)
    def test_changed_bytes_of_safetensors(self, data, tmp_path_factory):
        """Whatever header and bytes are, the answer is arrays or a ValueError."""
        file = tmp_path_factory.mktemp("changed") / "file.safetensors"
        write_safetensors(file, {"a": SIX, "b.weight": TWO}, metadata={"format": "pt"})
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(content[: data.draw(st.integers(1, len(content)))])
        with contextlib.suppress(ValueError):
            assert all(isinstance(array, np.ndarray) for array in read_tensors(file).values())

    @given(
        header=st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**70), 2**70)
            | st.sampled_from(["F32", "I64", "F9", ""]),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["w", "dtype", "shape", "data_offsets", "__metadata__"]),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=12,
        )
    )
    @settings(max_examples=200, deadline=None)
    def test_headers_of_any_json(self, header, tmp_path_factory):
        file = tmp_path_factory.mktemp("header") / "file.safetensors"
        text = json.dumps({"w": header} if not isinstance(header, dict) else header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
        with pytest.raises(ValueError, match=r"file\.safetensors (is truncated or damaged|holds )"):
            read_tensors(file)

    def test_a_header_nested_deeply(self, tmp_path):
        file = tmp_path / "file.safetensors"
        text = b'{"w":' * 100_000 + b"1" + b"}" * 100_000
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(ValueError, match=r"file\.safetensors is truncated or damaged: .*recursion"):
            read_tensors(file)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("name", ["float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz"])
def test_float8_of_pytorch(kind, name, tmp_path):
    """Every finite value, against PyTorch's own widening."""
    torch = pytest.importorskip("torch")
    file = tmp_path / "file"
    stored = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(getattr(torch, name))
    value = {"w": stored.view(16, 16).t(), "row": stored[3:7]}
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file({k: v.contiguous().clone() for k, v in value.items()}, file)
    else:
        torch.save(value, file, _use_new_zipfile_serialization=kind == "zip")
    found = read_tensors(file)
    for key, expected in value.items():
        assert found[key].dtype == np.dtype(getattr(ml_dtypes, name))
        assert not found[key].flags.writeable
        np.testing.assert_array_equal(found[key].astype(np.float32), expected.to(torch.float32).numpy())


@pytest.mark.parametrize("suffix", WRITERS)
def test_names_and_keys_are_text(suffix, tmp_path):
    path = tmp_path / f"file.{suffix}"
    with pytest.raises(TypeError, match=r"`tensors` has names that are no text: 3, \('a',\)"):
        WRITERS[suffix](path, {"a": SIX, 3: SIX, ("a",): SIX})
    assert list(tmp_path.iterdir()) == []
    WRITERS[suffix](path, {"a": SIX})
    with pytest.raises(TypeError, match="`key` is of type int"):
        read_tensors(path, key=3)
