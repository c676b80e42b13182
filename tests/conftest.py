import pytest
from hypothesis import settings
from toy_run import make_base

# A slow or busy machine is no fault of the code: no example has a deadline.
settings.register_profile("course", deadline=None)
settings.load_profile("course")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    "Folder of a tiny base model, for tests that only read it"
    return make_base(tmp_path_factory.mktemp("base"))
