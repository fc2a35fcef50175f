"""The names of SGLang's CPU kernel package, which no package index offers.

Without AMX every numeric path of SGLang is plain torch, and these names are imported only. Calling one raises
an error, so that no result comes from a replacement.
"""

__version__ = "0.0.0+names.only"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_, **__):
        raise NotImplementedError(f"sgl_kernel.{name} needs SGLang's CPU kernel package, which is not installed")

    missing.__name__ = name
    return missing
