"""The parts of `benchmarks/gpu.py`, each run in a process of its own.

Each says what it finds by `tell`, an entry of the results a call. What a part needs is imported in
it: the process that runs the parts, which waits for them, needs none of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parent
REFERENCE = FOLDER / "results" / "gpu_reference.npz"


def tell(**entry) -> None:
    """An entry of the results, from a part's process."""
    print(json.dumps(entry), flush=True)


def known(arguments: argparse.Namespace, **values) -> dict | None:
    """The entry with these values that an earlier run has found on this card, if there is one.

    What failed is to be tried again.
    """
    if not arguments.out or not arguments.out.exists():
        return None
    values["device"] = device_name()
    entries = json.loads(arguments.out.read_text(encoding="utf-8"))
    made = (e for e in entries if "failed" not in e)
    fitting = (e for e in made if all(e.get(name) == value for name, value in values.items()))
    return next(fitting, None)


def device_name() -> str:
    """The card, or the CPU, as results name it."""
    from vaeflow.model.device import use_gpu_if_any

    said = use_gpu_if_any()
    return said if said.startswith("GPU") else "CPU"


# === device, limits ===


def device(arguments: argparse.Namespace) -> None:
    """What there is."""
    import importlib.metadata

    import jax

    versions = {"jax": jax.__version__}
    for name in ("keras", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    tell(device=device_name(), **versions)


def limits(arguments: argparse.Namespace) -> None:
    """Floating-point operations and bytes a second; the time to draw a batch of uniforms."""
    import jax
    from jax import numpy as jnp

    device_name()
    size, megabytes = (256, 8) if arguments.tiny else (8192, 2048)
    for kind in ("bfloat16", "float32"):
        matrix = jax.random.normal(jax.random.key(0), (size, size), kind)
        seconds = seconds_of(jax.jit(lambda x: x @ x), matrix)
        tell(
            name="matrix products",
            precision="mixed_bfloat16" if kind == "bfloat16" else "float32",
            teraflops=round(2 * size**3 / seconds / 1e12, 3),
        )
    values = jnp.zeros(megabytes * 2**18, "float32")
    seconds = seconds_of(jax.jit(lambda x: x + 1), values)
    tell(name="copying", gigabytes_per_second=round(2 * values.nbytes / seconds / 1e9, 1))
    for generator in ("threefry2x32", "rbg"):
        key = jax.random.key(0, impl=generator)
        draw = jax.jit(lambda key: jax.random.uniform(key, (2048, 28, 28, 1)))
        microseconds = round(1e6 * seconds_of(draw, key), 1)
        tell(name=generator, microseconds=microseconds, draws=2048 * 784)


def seconds_of(function, argument, runs: int = 5, calls: int = 10) -> float:
    """The median time of a call, compiled and warm."""
    import jax

    jax.block_until_ready(function(argument))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(argument)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return sorted(times)[runs // 2]


# === correctness ===

SMALL = {"filters": (8, 16), "hidden_units": 32, "latent_dim": 8, "depth": 2}
STEP_IMAGES, CURVE_IMAGES, CURVE_BATCH, CURVE_EPOCHS = 64, 320, 32, 20
TOLERANCE = 1e-4


def correctness(arguments: argparse.Namespace) -> None:
    """Beside the CPU's: a step from the same weights and noise, and 200 steps; then resuming."""
    import numpy as np

    reference = np.load(REFERENCE)
    for name, values in steps_and_curves(arguments.tiny):
        expected = reference[name][: len(values)]
        if name.endswith("step"):
            error = float(np.linalg.norm(values - expected) / np.linalg.norm(expected))
            tell(name=name, relative_error=error, within=bool(error <= TOLERANCE))
        else:
            errors = np.abs(values / expected - 1)
            tell(
                name=name,
                largest_relative_error=float(errors.max()),
                of_the_first_20_steps=float(errors[:2].max()),
                last=float(values[-1]),
                last_on_a_cpu=float(expected[-1]),
            )
    resuming(arguments)


def reference(arguments: argparse.Namespace) -> None:
    """Write the CPU's side; run it where there is no GPU."""
    import numpy as np

    if device_name() != "CPU":
        raise SystemExit("the reference is a CPU's: set JAX_PLATFORMS=cpu")
    np.savez_compressed(REFERENCE, **dict(steps_and_curves(tiny=False)))


def steps_and_curves(tiny: bool):
    """Names and values: of each network the change of all weights by a step, and 20 mean losses."""
    import keras
    import numpy as np
    from contestants.networks import SHAPE

    from vaeflow.config.model import VAEConfig
    from vaeflow.data.batches import Batches
    from vaeflow.model.device import choose_batches_at_once, use_full_precision
    from vaeflow.model.steps.optimizer import Adam
    from vaeflow.model.vae import VAE

    class FixedNoise(VAE):
        """Draws the same for everyone, whatever generator the backend has."""

        def _draw_noise(self, images, seed):
            shape = (1, STEP_IMAGES, SMALL["latent_dim"])
            noise = np.random.default_rng(2).normal(size=shape).astype("float32")
            return keras.ops.convert_to_tensor(noise)

    device_name()
    use_full_precision()
    images = discs(CURVE_IMAGES)
    for network in ("conv", "residual"):
        vae = FixedNoise(VAEConfig(SHAPE, network=network, **SMALL))
        before = set_weights(vae)
        # By itself, Adam makes as long a step of a gradient near 0 as of any other: rounding then
        # decides where to.
        vae.compile(optimizer=Adam(0.01, epsilon=1e-3), jit_compile=True)
        vae.fit(Batches(images[:STEP_IMAGES], STEP_IMAGES), shuffle=False, verbose=0)
        after = np.concatenate([value.numpy().ravel() for value in vae.trainable_variables])
        yield f"{network} step", after - before

        keras.utils.set_random_seed(0)
        vae = VAE(VAEConfig(SHAPE, network=network, binarize="dynamic", **SMALL))
        set_weights(vae)
        vae.compile(optimizer=Adam(0.001), jit_compile=True)
        batches = Batches(images, CURVE_BATCH, shuffle_seed=0, at_once=choose_batches_at_once())
        epochs = 2 if tiny else CURVE_EPOCHS
        history = vae.fit(batches, epochs=epochs, shuffle=False, verbose=0).history
        yield f"{network} curve", np.array(history["loss"])


def set_weights(vae):
    """The same weights everywhere; returns them in one row."""
    import numpy as np

    generator = np.random.default_rng(1)
    for variable in vae.trainable_variables:
        fan = math.prod(variable.shape[:-1]) or 1
        scale = 0.01 if len(variable.shape) == 1 else math.sqrt(1 / fan)
        variable.assign(scale * generator.normal(size=variable.shape).astype("float32"))
    return np.concatenate([value.numpy().ravel() for value in vae.trainable_variables])


def discs(count: int):
    """Grey pictures of a disc each, uint8, `(count, 28, 28, 1)`."""
    import numpy as np

    generator = np.random.default_rng(0)
    places = np.arange(28)
    x, y = generator.uniform(8, 20, (2, count, 1, 1))
    radius = generator.uniform(3, 9, (count, 1, 1))
    distance = np.hypot(places[None, None, :] - x, places[None, :, None] - y)
    return (255 * np.clip(radius - distance, 0, 1)).astype(np.uint8)[..., None]


def resuming(arguments: argparse.Namespace) -> None:
    """Train twice with XLA's deterministic flags, once in two processes; compare the weights."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    with tempfile.TemporaryDirectory() as folder:
        start = [
            sys.executable,
            str(FOLDER / "gpu.py"),
            "--work",
            folder,
            *["--tiny"] * arguments.tiny,
        ]

        def run(role: str) -> subprocess.Popen:
            # A cache of its own: what it shows must not come from the same compiled program.
            own = {"XLA_FLAGS": flags, "VAEFLOW_CACHE": f"{folder}/cache-{role}"}
            command = [*start, "--only", f"resuming-{role}"]
            return subprocess.Popen(
                command, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True
            )

        whole, first = run("whole"), run("first")
        texts = [process.communicate()[0] for process in (whole, first)]
        texts.append(run("second").communicate()[0])
    whole, first, second = (
        [line for line in text.splitlines() if line.startswith(("sha256", "resumed"))]
        for text in texts
    )
    if len(whole) != 1 or first or len(second) != 2:
        raise SystemExit("a training did not end, or go on, as it should: see above")
    tell(name="resuming", xla_flags=flags, bit_exact=whole[0] == second[1])


def train_and_maybe_stop(arguments: argparse.Namespace, role: str) -> None:
    """Train on discs; `first` is told to end in the middle of an epoch, `second` goes on."""
    import hashlib

    import keras
    import numpy as np
    from contestants.networks import TINY

    from vaeflow.config.schema import Parameters, load_parameters
    from vaeflow.training.checkpoint import Checkpoints
    from vaeflow.training.loop import fit

    class Stop(keras.callbacks.Callback):
        """Tells the process to end after the third execution."""

        seen = 0

        def on_train_batch_end(self, batch, logs=None):
            self.seen += 1
            if self.seen == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    device_name()
    prepared = arguments.work / f"prepared-{role}"
    prepared.mkdir()
    images = discs(130 if arguments.tiny else 2080)
    np.save(prepared / "train.npy", images)
    np.save(prepared / "validation.npy", images[:64])
    (prepared / "dataset.json").write_text(json.dumps({"image_shape": images.shape[1:]}))
    small = {"epochs": 3, "batch_size": 16, "kl_warmup_epochs": 1}
    if arguments.tiny:
        small |= TINY
    preset = load_parameters(REPOSITORY / "presets" / "mnist-residual.yaml").train
    parameters = Parameters(train=preset.model_copy(update=small))
    kept = Checkpoints(arguments.work / ("whole" if role == "whole" else "kept"))
    stop = [Stop()] if role == "first" else []
    vae = fit(
        prepared,
        parameters,
        checkpoints=kept,
        resumed=lambda rows: print("resumed", flush=True),
        callbacks=stop,
    )
    digest = hashlib.sha256()
    for variable in (*vae.trainable_variables, *vae.optimizer.variables):
        digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
    print(f"sha256 {digest.hexdigest()}", flush=True)


# === rates ===

RIVALS = ("vaeflow", "jax-plain", "torch-compile", "torch-eager")
WINDOWS, WINDOW_SECONDS, ROW_SECONDS = 7, 0.4, 25.0
READY_SECONDS = 100.0
ROWS_AT_ONCE = 2  # made ready together: compiling takes longer than measuring


def rates(arguments: argparse.Namespace) -> None:
    """Each row's contestants in turns; rows of a run before are passed over."""
    rows = [
        (network, size, precision)
        for precision in ("mixed_bfloat16", "float32")
        for size in (2048, 128)
        for network in ("residual", "conv")
    ]
    if arguments.tiny:
        rows = [(f"tiny-{name}", 16, "float32") for name in ("residual", "conv")]
    names = ("part", "network", "batch_size", "precision", "name")
    if not arguments.again:
        rows = [
            row
            for row in rows
            if not known(arguments, **dict(zip(names, ("rates", *row, "vaeflow"), strict=True)))
        ]
    for start in range(0, len(rows), ROWS_AT_ONCE):
        _rates_of(rows[start : start + ROWS_AT_ONCE], arguments)


def _rates_of(rows: list[tuple], arguments: argparse.Namespace) -> None:
    from contestants import Contestant, possible

    images = 64 if arguments.tiny else 65_536
    end = time.monotonic() + READY_SECONDS * slower(arguments)
    ready = [
        [
            Contestant(
                *(name, size, precision, "--network", network, "--images", str(images)),
                log=arguments.work / f"{name}.log",
            )
            for name in possible(RIVALS)
        ]
        for network, size, precision in rows
    ]
    entries = [dict(zip(("network", "batch_size", "precision"), row, strict=True)) for row in rows]
    for index, entry in enumerate(entries):
        ready[index] = _those_that(
            lambda contestant: contestant.wait(max(1, end - time.monotonic())), ready[index], entry
        )
    for contestants, entry in zip(ready, entries, strict=True):
        _measure(contestants, entry, images, arguments)


def _those_that(do, contestants: list, entry: dict) -> list:
    """The contestants that have done it; of the others it is told that they failed."""
    from contestants import ContestantError

    left = []
    for contestant in contestants:
        try:
            do(contestant)
            left.append(contestant)
        except ContestantError as error:
            tell(name=contestant.name, **entry, failed=str(error))
    return left


def _measure(contestants: list, entry: dict, images: int, arguments: argparse.Namespace) -> None:
    """Have them train in turns, windows of about the same time, and tell their rates."""
    contestants = _those_that(lambda contestant: contestant.window(1), contestants, entry)
    epochs = {}
    for contestant in contestants:
        rate = contestant.rates.pop()
        epochs[contestant.name] = max(1, round(WINDOW_SECONDS * rate / images))
    start = time.monotonic()
    for index in range(2 if arguments.tiny else WINDOWS):
        if index >= 3 and time.monotonic() - start > ROW_SECONDS:
            break
        for contestant in contestants:
            contestant.window(1 if arguments.tiny else epochs[contestant.name])
    limit = limit_of(tuple(entry.values()), arguments)
    for contestant in contestants:
        found = contestant.summary()
        if limit:
            found["share_of_limit"] = round(found["images_per_second"] / limit, 3)
        memory = contestant.end()
        tell(name=contestant.name, **entry, **found, **contestant.said, peak_memory_mb=memory)


def slower(arguments: argparse.Namespace) -> float:
    """By how much each limit of time is longer: as the time for all of it."""
    return max(1.0, arguments.minutes / 8)


def limit_of(row: tuple, arguments: argparse.Namespace) -> float | None:
    """Images a second that the card's own limits, as measured, allow; None where they are not."""
    network, size, precision = row
    products = known(arguments, part="limits", name="matrix products", precision=precision)
    copying = known(arguments, part="limits", name="copying")
    if not products or not copying:
        return None
    operations, moved = work_of(network, size, precision)
    return size / max(
        size * operations / (1e12 * products["teraflops"]),
        moved / (1e9 * copying["gigabytes_per_second"]),
    )


def work_of(network: str, batch_size: int, precision: str) -> tuple[float, float]:
    """Operations of a step per image, and bytes that a step must move at least.

    Of each layer's output: written, read by the next layer, read again for the gradient of that
    layer's weights; its gradient written, and read twice. All else is taken to happen on the way.
    Of each weight, float32: read twice, its gradient written and read, it and Adam's two moments
    read and written.
    """
    from contestants.matrix_products import operations
    from contestants.networks import NETWORKS, SHAPE

    from vaeflow.config.model import VAEConfig
    from vaeflow.model.vae import VAE

    vae = VAE(VAEConfig(SHAPE, **NETWORKS[network]))
    outputs = sum(
        math.prod(layer.output.shape[1:])
        for part in (vae.encoder, vae.decoder)
        for layer in part.layers
        if hasattr(layer, "kernel")
    )
    weights = sum(math.prod(variable.shape) for variable in vae.trainable_variables)
    width = 2 if precision == "mixed_bfloat16" else 4
    return operations(vae), 6 * width * outputs * batch_size + (2 + 2 + 6) * 4 * weights


# === nats ===


def nats(arguments: argparse.Namespace) -> None:
    """Seconds of each contestant until -ELBO is 100 nats, from nothing compiled."""
    import numpy as np
    from contestants import Contestant, ContestantError, possible

    goal = 1e9 if arguments.tiny else 100
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npz"
        train, test = images_of(arguments, "train"), images_of(arguments, "test")
        np.savez(path, train=train, test=test)
        for name in possible(RIVALS):
            if known(arguments, part="nats", name=name) and not arguments.again:
                continue
            # Of its own: what was compiled in another part is not taken from there.
            os.environ["VAEFLOW_CACHE"] = f"{folder}/{name}"
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{name}/torch"
            options = ("--network", "tiny-conv" if arguments.tiny else "conv", "--cold")
            log = arguments.work / f"{name}.log"
            contestant = Contestant(name, 128, "mixed_bfloat16", *options, log=log)
            try:
                contestant.wait()
                said = contestant.ask(f"until {goal} {path}")
                size = said.pop("batch_size", 128)
                tell(name=name, network="conv", until_nats=goal, batches_of=size, **said)
                contestant.end()
            except ContestantError as error:
                tell(name=name, failed=str(error))


def images_of(arguments: argparse.Namespace, split: str):
    """MNIST's; discs in a trial without it."""
    from mnist import mnist

    if arguments.data:
        images = mnist(arguments.data, split)
        return images[:1024] if arguments.tiny else images
    return discs(1024 if split == "train" else 128)


# === likelihood, bound ===

TRAIN_SECONDS = 240
LEAST = 3  # epochs, however slow the machine
SAMPLES, AT_ONCE = 1000, 2000
SEED = 0


def likelihood(arguments: argparse.Namespace) -> None:
    """Train the residual preset for four minutes, then the bound; both go on where they were."""
    import numpy as np

    from vaeflow.model.device import use_full_precision
    from vaeflow.model.vae import load_vae

    device_name()
    folder = arguments.work / ("likelihood-tiny" if arguments.tiny else "likelihood")
    if arguments.again:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "training.json"
    if not record.exists():
        train_for(30 if arguments.tiny else TRAIN_SECONDS, folder, arguments)
    use_full_precision()
    from kept_bounds import kept_bounds

    images = images_of(arguments, "test")[: 16 if arguments.tiny else None]
    vae = load_vae(folder / "model.keras")
    samples = 8 if arguments.tiny else SAMPLES
    start = time.perf_counter()
    bounds = kept_bounds(vae, folder, images, samples, SEED, AT_ONCE)
    values = bounds["importance_weighted_bound"]
    tell(
        name="vaeflow",
        network="residual",
        prior="N(0, I)",
        nll=round(-float(values.mean()), 4),
        standard_error=round(float(values.std(ddof=1) / math.sqrt(len(values))), 4),
        elbo=round(float(np.mean(bounds["elbo"])), 4),
        images=len(images),
        samples=samples,
        bound_seconds=round(time.perf_counter() - start, 1),
        **json.loads(record.read_text()),
    )


def train_for(seconds: float, folder: Path, arguments: argparse.Namespace) -> None:
    """Train the preset, compilation included, the learning rate falling to 0 with the time.

    Told to end, it keeps a checkpoint, and goes on from there in the next run.
    """
    import keras
    from contestants.networks import TINY

    from vaeflow.config.schema import load_parameters
    from vaeflow.training.checkpoint import Checkpoints
    from vaeflow.training.loop import Training, make_compiled

    settings = load_parameters(REPOSITORY / "presets" / "mnist-residual.yaml").train
    rate = settings.learning_rate
    changes = {"learning_rate_schedule": "constant", "seed": SEED, "epochs": 10**6}
    if arguments.tiny:
        changes |= TINY
    settings = settings.model_copy(update=changes)
    images = images_of(arguments, "train")
    keras.utils.set_random_seed(settings.seed)
    kept = Checkpoints(folder / "checkpoints")
    clock = folder / "seconds.json"
    start = time.perf_counter()
    vae = make_compiled(images.shape[1:], len(images), settings)
    # Nothing is chosen by the validation: a few training images stand in.
    training = Training(vae, settings, images, images[:1000], kept, _row, [])
    before = json.loads(clock.read_text()) if training.resume() and clock.exists() else 0.0

    def spent() -> float:
        return before + time.perf_counter() - start

    try:
        with training.signals, training.progress_bar():
            # An epoch that was begun is ended: only then the model has its averaged weights.
            while spent() < seconds or training.progress.batch or training.progress.epoch < LEAST:
                share = min(1.0, spent() / seconds)
                vae.optimizer.learning_rate = 0.5 * rate * (1 + math.cos(math.pi * share))
                training.make_epoch()
                clock.write_text(json.dumps(spent()))
    finally:
        clock.write_text(json.dumps(spent()))
    vae.save(folder / "model.keras")
    epochs = training.progress.epoch
    record = {
        "train_seconds": round(spent(), 1),
        "epochs": epochs,
        "train_images_per_second": round(epochs * len(images) / spent()),
        "batch_size": settings.batch_size,
    }
    (folder / "training.json").write_text(json.dumps(record))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # none, if it took no minute


def _row(row) -> None:
    print(f"epoch {row['epoch']}: elbo {row['elbo']:.2f} nats", flush=True)


def bound(arguments: argparse.Namespace) -> None:
    """Draws a second of the bound, beside those of the decoder alone in batches as large."""
    import jax
    import numpy as np
    from contestants.networks import NETWORKS, SHAPE

    from vaeflow.config.model import VAEConfig
    from vaeflow.evaluation.bounds import compute_bounds, draws_at_once
    from vaeflow.model.device import use_full_precision
    from vaeflow.model.steps import backend
    from vaeflow.model.vae import VAE

    device_name()
    use_full_precision()
    for network in ("tiny-residual",) if arguments.tiny else ("residual", "conv"):
        vae = VAE(VAEConfig(SHAPE, **NETWORKS[network]))
        samples = 8 if arguments.tiny else SAMPLES
        few = 64 if arguments.tiny else 128
        times = []
        for count in (few, few, 3 * few):  # the first has everything compiled for the first time
            start = time.perf_counter()
            compute_bounds(vae, discs(count), samples, SEED)
            times.append(time.perf_counter() - start)
        rate = 2 * few * samples / (times[2] - times[1])
        size = draws_at_once(vae) // 64 * 64 or 64
        latents = np.zeros((size, vae.config.latent_dim), np.float32)
        decode = backend().compiled(vae, vae.decoder, [latents.shape])
        alone = size / seconds_of(decode, jax.device_put(latents), calls=3)
        tell(
            name="bound",
            network=network,
            draws_per_second=round(rate),
            decoder_alone=round(alone),
            ratio=round(rate / alone, 3),
        )


# === paper ===

# Dense products and memory of an H100 SXM, by NVIDIA's data sheet.
H100 = {"mixed_bfloat16": 989e12, "float32": 495e12, "bytes": 3.35e12}


def paper(arguments: argparse.Namespace) -> None:
    """What an H100 could reach, and what XLA says of the steps that it would be given."""
    import jax
    import numpy as np
    from contestants.networks import NETWORKS, SHAPE

    from vaeflow.config.model import VAEConfig
    from vaeflow.data.batches import Batches
    from vaeflow.model.device import layers_in, put_on_device
    from vaeflow.model.steps.optimizer import Adam
    from vaeflow.model.vae import VAE

    networks = ("tiny-conv",) if arguments.tiny else ("conv", "residual")
    for network in networks:
        for size in (16,) if arguments.tiny else (128, 2048):
            for precision in ("mixed_bfloat16", "float32"):
                with layers_in(precision):
                    vae = VAE(VAEConfig(SHAPE, **NETWORKS[network], binarize="dynamic"))
                vae.compile(optimizer=Adam(0.001), jit_compile=True)
                vae.optimizer.build(vae.trainable_variables)
                groups = (vae.trainable_variables, vae.non_trainable_variables)
                groups += (vae.optimizer.variables, vae.metrics_variables)
                state = tuple([variable.value for variable in group] for group in groups)
                data = Batches(put_on_device(np.zeros((size, *SHAPE), np.uint8)), size)[0]
                step = jax.jit(vae.train_step, donate_argnums=0).lower(state, data)
                cost = step.compile().cost_analysis()
                operations, moved = work_of(network, size, precision)
                times = {
                    "products": size * operations / H100[precision],
                    "memory": moved / H100["bytes"],
                }
                bounded_by = max(times, key=times.get)
                tell(
                    name="H100 by its data sheet",
                    network=network,
                    batch_size=size,
                    precision=precision,
                    operations_per_image=operations,
                    bytes_per_image=round(moved / size),
                    xla_operations_per_image=round(cost["flops"] / size),
                    xla_bytes_per_image=round(cost["bytes accessed"] / size),
                    limit_images_per_second=round(size / times[bounded_by]),
                    bounded_by=bounded_by,
                )


PARTS = {
    "device": device,
    "limits": limits,
    "correctness": correctness,
    "rates": rates,
    "nats": nats,
    "likelihood": likelihood,
    "bound": bound,
    "paper": paper,
    "reference": reference,
    **{
        f"resuming-{role}": lambda arguments, role=role: train_and_maybe_stop(arguments, role)
        for role in ("whole", "first", "second")
    },
}
