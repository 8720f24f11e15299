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
