"""Compile the CPU kernels into the wheel where there is a C compiler; install without them where there is none."""

import importlib.util
import logging
import shutil
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = Path("ssmzoo", "ops", "native")
NO_CACHES = shutil.ignore_patterns("__pycache__")


class BuildWithKernels(build_py):
    def run(self):
        shutil.rmtree(Path(self.build_lib, "ssmzoo"), ignore_errors=True)  # sources that are gone by now
        super().run()
        if not self.editable_mode:  # a checkout has them beside the package, a wheel inside
            for folder in ("configs", "benchmarks"):
                shutil.copytree(folder, Path(self.build_lib, "ssmzoo", folder), dirs_exist_ok=True, ignore=NO_CACHES)
        spec = importlib.util.spec_from_file_location("build_kernels", NATIVE / "build.py")
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        try:
            kernels.build(NATIVE if self.editable_mode else Path(self.build_lib, NATIVE))
        except kernels.BuildError as error:
            reason = str(error).splitlines()[0]
            self.announce(
                f"ssmzoo: the CPU kernels were not compiled ({reason}); plain PyTorch serves instead. With "
                "a C compiler, `python -m ssmzoo.ops.native.build` adds them.",
                level=logging.WARNING,
            )


class PlatformDistribution(Distribution):
    def has_ext_modules(self):  # the wheel holds machine code ...
        return True


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):  # ... that knows nothing of Python's version
        return "py3", "none", super().get_tag()[2]


setup(
    packages=find_packages(include=["ssmzoo", "ssmzoo.*"]),
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": AnyPythonWheel},
)
