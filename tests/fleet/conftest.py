from tests.scripts.conftest import fakes

__all__ = ["fakes"]
