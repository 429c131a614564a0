"""What a module of TensorRT or TensorRT-RTX has: `python tensorrt_names.py MODULE` prints it as JSON.

TensorRT's Python package comes from any package index, its libraries do not. Nothing but names is wanted here, so empty
libraries stand in for them: `empty_libraries` makes some, and LD_LIBRARY_PATH finds them.
"""

import importlib
import json
import os
import re
import subprocess
import sys

# Whose addresses the module takes when it is imported.
_ENTRY_POINTS = ("getBuilderPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins")


def empty_libraries(folder, compiler, major):
    """The three libraries that TensorRT's Python module wants, with nothing in them."""
    source = folder / "empty.c"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in _ENTRY_POINTS))
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        file = f"lib{name}.so.{major}"
        subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", folder / file, source], check=True)


def names(module):
    """Of each class, its public names with the parameters of each way to call it: {class: {name: [[parameter]]}}.

    Parameters are read from the signatures that pybind11 puts into docstrings, without `self`; what is not called has
    no ways. "" has the module's own names.
    """
    found = {"": {name: [] for name in vars(module) if not name.startswith("_")}}
    for name, kind in list(vars(module).items()):
        if isinstance(kind, type) and not name.startswith("_"):
            found[name] = {each: _ways(getattr(kind, each)) for each in dir(kind) if not each.startswith("_")}
            for inner, enumeration in vars(kind).items():  # ILogger.Severity
                if isinstance(enumeration, type) and hasattr(enumeration, "__members__"):
                    found[inner] = {each: [] for each in enumeration.__members__}
    return found


def _ways(attribute):
    if not callable(attribute) or isinstance(attribute, type):
        return []
    signatures = re.findall(r"^(?:\d+\. )?\w+\((.*)\) -> ", attribute.__doc__ or "", re.M)
    return [re.findall(r"(\w+): ", re.sub(r"\[[^\]]*\]|<[^>]*>", "", text))[1:] for text in signatures]


if __name__ == "__main__":
    sys.setdlopenflags(os.RTLD_LAZY)  # a function need not be there until it is called
    sys.stdout.write(json.dumps(names(importlib.import_module(sys.argv[1]))))
