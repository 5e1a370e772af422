import os
import signal
import threading

import numpy as np
import pytest

from vaeflow.data.batches import batches
from vaeflow.model.vae import VAE
from vaeflow.training.stopping import StopBetweenSteps


@pytest.fixture(scope="module")
def vae():
    vae = VAE((8, 8, 1), latent_dim=2, filters=(4,), hidden_units=8)
    vae.compile(optimizer="adam")
    return vae


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_at_any_moment_ends_the_training_and_is_given_back(vae, digits, number):
    before = signal.getsignal(number)
    data = batches(digits[:512], 16, shuffle_seed=0)
    for delay in np.random.default_rng(number).uniform(0.3, 0.8, size=8):
        stop = StopBetweenSteps()
        timer = threading.Timer(delay, os.kill, (os.getpid(), number))
        timer.start()
        with pytest.raises(SystemExit) as ended:
            vae.fit(data, validation_data=data, epochs=10_000, callbacks=[stop], verbose=0)
        timer.join()
        assert ended.value.code == 128 + number
        assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored(vae, digits):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopBetweenSteps()
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGHUP)).start()
        vae.fit(batches(digits[:512], 16), epochs=3, callbacks=[stop], verbose=0)
        assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)
