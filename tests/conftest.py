"""What tests of all parts share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """A test's random numbers do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def relative_rms():
    """Root mean square of the difference, relative to the reference's, computed in float64; NaN and unequal shapes fail."""

    def error(value, reference):
        assert value.shape == reference.shape
        value, reference = value.detach().double(), reference.detach().double()
        return ((value - reference).norm() / reference.norm()).item()

    return error


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """The file of a tiny backbone of random numbers."""
    from tests.tiny import save_tiny  # imports the engine, which most tests can do without

    return save_tiny(tmp_path_factory.mktemp("mini") / "tiny.safetensors")


@pytest.fixture(scope="session")
def restorer(weights):
    """The tiny backbone, loaded."""
    from ebr_engine import Restorer

    return Restorer(model=weights, device="cpu", precision="fp32", compile="off")


@pytest.fixture(scope="session")
def prompt():
    """A prompt for the tiny backbone."""
    from tests.tiny import make_prompt

    return make_prompt()


@pytest.fixture(scope="session")
def one_line():
    """Checks that what `pytest.raises` caught says these words in one line."""

    def check(error, words):
        assert "\n" not in str(error.value)
        assert len(str(error.value)) > 10
        for word in words:
            assert word in str(error.value)

    return check
