"""How near restored sound is to the clean one, and a Wiener filter to measure beside."""

import numpy as np

FRAME = 512  # samples of the filter's window, half of which neighbours share
SMOOTHING = 0.98  # of the signal-to-noise ratio from frame to frame
FLOOR = 0.1  # least gain: what is left of the noise
QUIET = 0.15  # share of the frames, in each band the quietest ones, that show the noise alone


def si_sdr(estimate: np.ndarray, clean: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio of sound [n], in dB.

    Of the estimate, the part along the clean sound over the rest, both without their means. Source: Le Roux, Wisdom, Erdogan and
    Hershey, "SDR – half-baked or well done?", 2019.
    """
    estimate, clean = (np.asarray(sound, dtype=np.float64) - np.mean(sound) for sound in (estimate, clean))
    target = clean * (estimate @ clean / max(float(clean @ clean), 1e-20))
    error = estimate - target
    return float(10 * np.log10(max(float(target @ target), 1e-20) / max(float(error @ error), 1e-20)))


def wiener(noisy: np.ndarray, rate: int) -> np.ndarray:
    """Sound [n] through a spectral Wiener filter that learns the noise from the quietest frames.

    Its gain is ξ/(1 + ξ) with the decision-directed estimate of the signal-to-noise ratio ξ (Ephraim and Malah, 1984; Scalart and
    Filho, 1996). The noise's power in a band is the mean of the quietest 15 % of its frames, corrected for being the quietest of
    exponentially distributed powers.
    """
    from scipy.signal import istft, stft

    spectrum = stft(noisy, rate, nperseg=FRAME)[2]  # [bands, frames]
    power = np.abs(spectrum) ** 2
    count = max(1, round(QUIET * power.shape[1]))
    noise = np.sort(power, axis=1)[:, :count].mean(1) / _least_mean(QUIET) + 1e-20
    gain, before = np.empty_like(power), np.zeros(len(noise))
    for i, frame in enumerate(power.T):
        ratio = SMOOTHING * before / noise + (1 - SMOOTHING) * np.maximum(frame / noise - 1, 0)
        gain[:, i] = np.maximum(ratio / (1 + ratio), FLOOR)
        before = gain[:, i] ** 2 * frame
    return istft(spectrum * gain, rate, nperseg=FRAME)[1][: len(noisy)]


def _least_mean(share: float) -> float:
    """The mean of the least `share` of exponentially distributed numbers whose mean is 1."""
    return float((share + (1 - share) * np.log1p(-share)) / share)
