import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
from extension_build import BuildExtension, extensions

setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
