"""The whole configuration of a run: one tree of frozen, validated models.

Every key has a type, a default and a description, which `--help`, the error lines and the sweeps read from here.
`config_source.py` fills the tree from presets, YAML files and dotted overrides. Progress is counted in images.
"""

from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

NetworkName = Literal["encoder", "decoder", "discriminator"]
NETWORK_NAMES: tuple[NetworkName, ...] = ("encoder", "decoder", "discriminator")
MAX_STREAMS = 64
STORAGE_SCHEMES = ("s3", "gs", "az", "abfs", "abfss", "file")

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A node of the tree: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


def without_secret(url: str | None, remedy: str = "leave them to the environment") -> str | None:
    """A URL or path that goes into logs, reports and checkpoints; the error does not repeat it."""
    parts = urlsplit(url or "")
    if "://" in (url or "") and (("@" in parts.netloc and not parts.scheme.startswith("abfs")) or parts.query):
        raise ValueError(f"the {parts.scheme}:// URL holds credentials; {remedy}")
    return url


class PhaseSettingsError(ValueError):
    """A phase's `settings` do not fit the objective: keeps the phase's name for the error line."""

    def __init__(self, phase: str, error: ValidationError) -> None:
        super().__init__(f"phases.{phase}.settings: {error}")
        self.phase, self.error = phase, error


SectionT = TypeVar("SectionT", bound=Section)


class RunSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "run"
    """name of the run; the same name continues the same run"""
    storage: str = "runs"
    """folder that holds the runs; on several nodes one that all of them share, or a URL (s3:// gs:// az://), to which
    checkpoints, history and pictures are uploaded"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """seed of everything random: weights, order, noise"""

    @field_validator("storage")
    @classmethod
    def _writable_kind(cls, storage: str) -> str:
        scheme, separator, _ = storage.partition("://")
        if separator and scheme not in STORAGE_SCHEMES:
            raise ValueError(f"{scheme}:// cannot be written; use a folder or one of {', '.join(STORAGE_SCHEMES)}")
        return storage

    @field_validator("storage")
    @classmethod
    def _keeps_no_secret(cls, path: str) -> str | None:
        return without_secret(path)


class DataSection(Section):
    path: str = "data/digits"
    """prepared data set: a folder that holds train/dataset.json (or dataset.json itself), or its URL
    (s3:// gs:// az:// https:// file://; credentials come from the environment)"""
    streams: Positive | None = None
    """streams of the epoch's order; every worker count that divides it sees the same batches
    (default: the largest divisor of batch_size up to 64)"""
    block_shards: Positive = 4
    """shards' worth of samples that are shuffled together inside a stream"""
    remainder: Literal["drop", "pad"] = "drop"
    """samples of an epoch that fill no whole batch: drop leaves them out (others in every epoch); pad fills the last
    batch with samples from the beginning of each stream"""
    flip: bool = False
    """augmentation: mirror each training picture, left and right, in half of all epochs"""
    random_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """augmentation: smallest share of a training picture's area that is cut out at random, in the picture's own shape,
    and enlarged to the whole (0.8 is mild); 1: none"""
    loader_workers: Count = 0
    """reader processes per training worker; 0 reads in a thread beside the training loop"""
    prefetch: Positive = 4
    """batches read ahead per reader"""
    in_memory: bool | None = None
    """keep the decoded pictures in memory (default: when they take less than 512 MiB)"""
    max_bad_samples: Count = 0
    """broken samples that may be replaced, over all workers and restarts, before the run fails; each is named in the
    history, and again at the end"""
    cache_dir: str | None = None
    """folder on each node for shards fetched from a URL (default: `shards` in the user's cache folder)"""
    cache_bytes: Positive = 64 * 2**30
    """most bytes of fetched shards that a node keeps, shared by its workers"""

    @field_validator("path")
    @classmethod
    def _keeps_no_secret(cls, path: str) -> str | None:
        return without_secret(path)


class TrainingSection(Section):
    batch_size: Positive = 128
    """images per optimiser step over all workers together"""
    gradient_accumulation_steps: Positive = 1
    """micro-batches per optimiser step on each worker"""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 runs networks under autocast; losses, norms and optimisers stay float32"""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    """compile the networks with torch.compile in this mode; the last two capture CUDA graphs of each network and need a
    GPU. Passes that r1, r2 or gradient_penalty differentiate twice stay as they are: compiled code does not allow it"""
    cuda_graphs: bool | None = None
    """capture whole steps as CUDA graphs, but for those in which beta or the capacity moves (default: where one worker
    trains alone on a GPU, and compile is no or default)"""
    fused_norms: bool | None = None
    """group norms and their activations by kernels of this package, written in Triton (default: on a GPU where Triton
    works, with channels_last, and not compiled)"""
    channels_last: bool = True
    """memory format of pictures and convolution weights"""
    torch_threads: Count = 0
    """threads for tensor operations per worker (0: the CPUs of the worker)"""
    max_skipped_steps: Count = 3
    """consecutive steps with a non-finite gradient that are skipped before the run rolls back to its last checkpoint"""
    max_rollbacks: Count = 2
    """rollbacks, each with other noise than before, after which the next one is the run's end"""
    rollback_rate_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """factor on every learning rate for each rollback that the run has behind it"""

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainingSection":
        if self.cuda_graphs and self.compile not in ("no", "default"):
            raise ValueError(
                f"compile={self.compile} captures CUDA graphs itself; set compile=default, or cuda_graphs to false"
            )
        if self.fused_norms and self.compile != "no":
            raise ValueError(
                f"compile={self.compile} makes kernels for the norms itself; set compile=no, or leave fused_norms unset"
            )
        if self.fused_norms and not self.channels_last:
            raise ValueError("fused_norms needs channels_last=true; set it, or leave fused_norms unset")
        return self

    @field_validator("mixed_precision", "compile", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        """YAML reads a plain `no` as false."""
        return "no" if value is False else value


class ReportingSection(Section):
    log_images: Positive = 10_000
    """images between two log records (progress line, history.jsonl)"""
    sample_images: Positive = 100_000
    """images between two sets of pictures (samples, reconstructions)"""
    samples: Annotated[int, Field(gt=0, le=1024)] = 64
    """pictures in a sample grid"""
    tensorboard: bool = True
    """write TensorBoard event files beside the history"""
    curves: bool = True
    """draw the history as curves.png at the end"""
    mlflow: bool = False
    """also log to the MLflow server of MLFLOW_TRACKING_URI (extra `mlflow`)"""
    mlflow_experiment: Annotated[str, Field(min_length=1)] = "vaegan_dist"
    """MLflow experiment that the run becomes part of"""
    wandb: bool = False
    """also log to Weights & Biases, set up by its own WANDB_ variables (extra `wandb`)"""
    wandb_project: Annotated[str, Field(min_length=1)] = "vaegan_dist"
    """Weights & Biases project that the run becomes part of"""
    metrics_port: Annotated[int, Field(ge=0, le=65_515)] = 9108
    """port of the metrics of a run or a sweep for Prometheus, or one of the 19 after it where it is taken; 0: none are
    served"""
    metrics_address: str | None = None
    """address that metrics are served at (default: 127.0.0.1, in a Kubernetes pod 0.0.0.0)"""
    pushgateway: str | None = None
    """URL of a Pushgateway for jobs too short to be scraped; credentials come from PUSHGATEWAY_USERNAME and
    PUSHGATEWAY_PASSWORD"""
    pushgateway_job: str | None = None
    """name of the job whose metrics these are at the Pushgateway (default: run.name)"""
    pushgateway_keep: bool = True
    """leave the job's metrics at the Pushgateway when it ends; false deletes them"""
    profile_steps: Count = 0
    """steps of each phase that torch's profiler records, after the first ten; 0: none"""

    @field_validator("pushgateway")
    @classmethod
    def _keeps_no_secret(cls, url: str | None) -> str | None:
        return without_secret(url, "give them in PUSHGATEWAY_USERNAME and PUSHGATEWAY_PASSWORD")


class EvaluationSection(Section):
    images: Count = 0
    """images between two evaluations of the averaged networks while training; one more ends each phase; 0: none"""
    samples: Annotated[int, Field(ge=16)] = 2000
    """pictures that an evaluation generates, and the most that it reconstructs"""
    features: Annotated[str, Field(min_length=1)] = "auto"
    """network that FID and its kin look with: auto (classifier for small labelled pictures, else efficientnet-lite0
    where it is installed), none, classifier, inception, inception=FILE, efficientnet-lite0, a TorchScript file or
    module:function"""
    split: Annotated[str, Field(min_length=1)] = "auto"
    """pictures to evaluate with: auto is the split validation where there is one, else train"""


class CheckpointSection(Section):
    images: Positive = 100_000
    """images between two checkpoints"""
    keep_last: Positive = 2
    """newest checkpoints kept; the last of each phase is kept as well"""
    keep_every_images: Count = 0
    """also keep, for good, the first checkpoint at or after each multiple of this many images; 0: none"""
    best_metric: Annotated[str, Field(min_length=1)] | None = None
    """metric of the evaluations whose best checkpoint is kept as well, named by best.json (default: none is)"""
    best_mode: Literal["min", "max"] = "min"
    """whether the best is the smallest or the largest value of that metric"""
    write_attempts: Positive = 5
    """times that the writing of a checkpoint is tried, while training goes on, before the run fails"""
    retry_seconds: Weight = 10.0
    """pause after the first such attempt; after the second twice as long, and so on"""
    write_timeout_seconds: Positive = 1800
    """time after which a checkpoint that is still being written counts as failed"""


class WorkerRange(Section):
    min: Positive = 1
    """fewest workers that the run goes on with"""
    max: Positive
    """most workers that it uses when there is room for them"""

    @model_validator(mode="after")
    def _ordered(self) -> "WorkerRange":
        if self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}; exchange them")
        return self


def _workers_tag(value: object) -> str:
    return "range" if isinstance(value, dict | WorkerRange) else "number"


Workers = Annotated[
    Annotated[Positive, Tag("number")] | Annotated[WorkerRange, Tag("range")], Discriminator(_workers_tag)
]


class ClusterSection(Section):
    workers: Workers = 1
    """training workers (DDP ranks); {min: 2, max: 8} under Ray: as many as there is room for, of those numbers that
    divide the streams, and the run moves at a checkpoint when that changes"""
    cpus_per_worker: Rate = 1.0
    """CPUs that Ray reserves for a worker"""
    gpus_per_worker: Weight = 0.0
    """GPUs that Ray reserves for a worker; 0 trains on the CPU"""
    max_failures: Count = 3
    """under Ray: failures of workers, without a checkpoint in between, after which the next one is the run's end"""
    max_start_failures: Count = 3
    """under Ray: the same for workers that could not be started though there was room for them"""
    max_preemptions: Count = 30
    """under Ray: the same for workers lost with a node whose end was announced"""
    start_timeout_seconds: Positive = 600
    """time to wait for the workers' resources, at the start and after a loss, before the run fails"""
    resize_seconds: Weight = 30.0
    """with a range of workers: time to wait for as many as before, after a loss, before going on with fewer"""
    collective_timeout_seconds: Positive = 600
    """time after which a collective that one rank never joined fails"""
    step_timeout_seconds: Positive = 300
    """time without a step after which a rank shows the stacks of its threads and ends"""

    @property
    def most_workers(self) -> int:
        """Workers when there is room for all."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def fewest_workers(self) -> int:
        """Workers that the run needs at least."""
        return self.workers if isinstance(self.workers, int) else self.workers.min


Norm = Literal["group", "batch", "none", "spectral"]


class MlpModel(Section):
    network: Literal["mlp"] = "mlp"
    """fully connected networks, for pictures of any size"""
    latent_dim: Positive = 20
    """dimensions of z"""
    hidden: Annotated[tuple[Positive, ...], Field(min_length=1)] = (128,)
    """widths of the encoder's hidden layers; the decoder mirrors them"""
    discriminator_hidden: Annotated[tuple[Positive, ...], Field(min_length=1)] = (128,)
    """widths of the discriminator's hidden layers"""
    discriminator_norm: Literal["none", "spectral"] = "none"
    """spectral: the discriminator's weights are divided by their largest singular value
    (default none; Miyato et al. 2018, arXiv 1802.05957)"""
    minibatch_std: Count = 0
    """images per group whose standard deviation the discriminator sees as one more feature; 0: none
    (default 0; Karras et al. 2018, arXiv 1710.10196, use 4)"""


class ConvModel(Section):
    network: Literal["conv"] = "conv"
    """convolutional networks after Larsen et al. 2016 (arXiv 1512.09300, table 1); each stage halves the resolution"""
    latent_dim: Positive = 32
    """dimensions of z"""
    channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (32, 64)
    """channels of the encoder's stages; the decoder mirrors them"""
    decoder_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    """channels after each of the decoder's stages (default: mirrors `channels`, and half of the first at the end)"""
    hidden: Positive = 256
    """width of the encoder's fully connected layer between convolutions and z"""
    discriminator_stem: Count = 0
    """channels of a convolution at full resolution that the discriminator begins with; 0: none (Larsen: 32)"""
    discriminator_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (32, 64)
    """channels of the discriminator's stages"""
    discriminator_hidden: Positive = 256
    """width of the discriminator's fully connected layer"""
    kernel_size: Literal[3, 5] = 5
    """size of every convolution's kernel (Larsen: 5)"""
    norm: Norm = "group"
    """normalisation in encoder and decoder: group (default; Wu & He 2018, arXiv 1803.08494); batch, over all workers
    and apart for real, reconstructed and generated pictures (Larsen et al. 2016); spectral, of the weights; none"""
    discriminator: Literal["plain", "residual"] = "plain"
    """plain: after Larsen et al.; residual: that of StyleGAN2 (Karras et al. 2020, arXiv 1912.04958), with
    `discriminator_channels` after its stages and `discriminator_stem` (default: the first of them) before"""
    discriminator_norm: Norm = "none"
    """normalisation in the discriminator (default none: R1 restrains it, Mescheder et al. 2018, arXiv 1801.04406;
    spectral: Miyato et al. 2018, arXiv 1802.05957)"""
    attention: tuple[Positive, ...] = ()
    """heights of feature maps after whose stage self-attention stands, in all three networks (default none;
    Zhang et al. 2018, arXiv 1805.08318: 32, at pictures of 128 pixels)"""
    minibatch_std: Count = 0
    """images per group whose standard deviation the discriminator sees as one more channel; 0: none
    (default 0; Karras et al. 2018, arXiv 1710.10196, use 4)"""


class KlModel(Section):
    network: Literal["kl"] = "kl"
    """latent-diffusion autoencoder (Rombach et al. 2022, arXiv 2112.10752) with a PatchGAN discriminator
    (Isola et al. 2017, arXiv 1611.07004); weights convert to diffusers' AutoencoderKL and back"""
    latent_channels: Positive = 4
    """channels of the latent picture (f8 of Rombach et al. 2022: 4)"""
    channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (128, 256, 512, 512)
    """channels at each resolution, each half of the one before: 3 entries give f4, 4 give f8, 5 give f16"""
    layers_per_block: Positive = 2
    """residual blocks at each resolution of the encoder; the decoder has one more (Rombach et al. 2022: 2)"""
    norm_groups: Positive = 32
    """groups of the group norms; must divide every entry of `channels` (Rombach et al. 2022: 32)"""
    discriminator_channels: Positive = 64
    """channels after the discriminator's first convolution, doubled by each further one up to eight times as many"""
    discriminator_layers: Positive = 3
    """convolutions of stride 2 in the discriminator (3: a patch of 70 x 70 pixels, Isola et al. 2017)"""
    discriminator: Literal["patch", "residual"] = "patch"
    """patch: a logit for each patch; residual: one for the picture, by that of StyleGAN2 (Karras et al. 2020,
    arXiv 1912.04958), with `discriminator_layers` stages"""
    discriminator_norm: Norm = "group"
    """normalisation in the discriminator (default group; Isola et al. 2017: batch)"""
    minibatch_std: Count = 0
    """discriminator=residual: images per group whose standard deviation the discriminator sees as one more channel;
    0: none (default 0; Karras et al. 2018, arXiv 1710.10196, use 4)"""


ModelSection = Annotated[MlpModel | ConvModel | KlModel, Field(discriminator="network")]


class ObjectiveSection(Section):
    beta: Weight = 1.0
    """weight of the KL divergence (default 1: the evidence bound; Higgins et al. 2017, beta-VAE)"""
    beta_schedule: Literal["constant", "linear", "cyclical"] = "constant"
    """linear: beta rises from 0 over beta_warmup_images; cyclical: it does so anew every beta_cycle_images
    (Fu et al. 2019, arXiv 1903.10145)"""
    beta_warmup_images: Count = 0
    """images of the phase over which beta rises from 0"""
    beta_cycle_images: Positive = 100_000
    """length of a cycle of the cyclical schedule, in images of the phase"""
    free_bits: Weight = 0.0
    """nats per latent dimension and image below which the KL is not pushed (default 0; Kingma et al. 2016,
    arXiv 1606.04934, there on the batch mean)"""
    capacity: Weight = 0.0
    """C of beta * |KL - C| in nats per image; 0 uses the plain KL (Burgess et al. 2018, arXiv 1804.03599)"""
    capacity_images: Count = 0
    """images of the phase over which C rises from 0 to `capacity`"""
    reconstruction: Literal["bernoulli", "l2", "l1", "none"] = "bernoulli"
    """pixel term, summed over an image: bernoulli (cross-entropy of (x + 1) / 2), l2 (half the squared error), l1"""
    reconstruction_weight: Weight = 1.0
    """weight of the pixel term"""
    perceptual_weight: Weight = 0.0
    """weight of the distance in a fixed network's features (Zhang et al. 2018, arXiv 1801.03924;
    Rombach et al. 2022: 1)"""
    perceptual_network: str | None = None
    """that network: a TorchScript file, or module:function which returns a torch module; it maps [B, 3, H, W] in
    [-1, 1] to one tensor of features or a list of them, [B, channels, ...] each"""
    similarity: Weight = 0.0
    """vaegan: weight of Larsen's learned similarity, half the squared distance of discriminator features"""
    similarity_layer: int = -1
    """discriminator layer of the similarity, counted over convolutions (mlp: hidden layers); -1: the last"""
    gamma: Weight = 1.0
    """vaegan: weight of the reconstruction in the decoder's loss against the adversarial one; the encoder's is 1
    (Larsen et al. 2016, equation 9)"""
    adversarial: Literal["minimax", "non_saturating", "hinge", "least_squares", "wasserstein", "relativistic"] = (
        "non_saturating"
    )
    """adversarial loss (default non_saturating: Goodfellow et al. 2014, section 3)"""
    adversarial_weight: Weight = 1.0
    """weight of the adversarial loss in the decoder's (and encoder's) loss"""
    adaptive_weight: bool = False
    """vaegan: multiply adversarial_weight by |grad rec| / |grad adv| at the decoder's last layer, over all workers (per
    micro-batch under gradient accumulation) (Esser et al. 2021, arXiv 2012.09841, equation 7; Rombach et al. 2022)"""
    adaptive_weight_max: Weight = 1e4
    """largest value of that ratio (1e4: the latent-diffusion reference implementation)"""
    adversarial_start_images: Count = 0
    """vaegan, gan: images of the phase before which neither player's adversarial loss trains anything
    (Rombach et al. 2022: 50,001 steps)"""
    fakes: Literal["prior", "prior+reconstruction", "reconstruction"] = "prior"
    """vaegan: pictures that the discriminator learns to tell from real ones (Larsen et al. 2016, equation 9: prior,
    algorithm 1: both; Rombach et al. 2022: reconstruction)"""
    adversarial_to_encoder: bool = False
    """vaegan where reconstructions are fakes: their adversarial loss trains the encoder as well
    (Rombach et al. 2022: true)"""
    r1: Weight = 0.0
    """gamma of the penalty gamma/2 * |dD/dx|^2 on real pictures (Mescheder et al. 2018, arXiv 1801.04406)"""
    r2: Weight = 0.0
    """gamma of the same penalty on fake pictures"""
    penalty_interval: Positive = 1
    """steps between two evaluations of r1 and r2, which then count this many times
    (lazy regularisation, Karras et al. 2020, arXiv 1912.04958, there 16)"""
    beta_neg: Weight = 256.0
    """introspective: weight of the KL of fake pictures in the encoder's exponential
    (Daniel & Tamar 2021, arXiv 2012.13253, reference implementation: 256 for pictures of 28 to 128 pixels)"""
    elbo_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """introspective: factor on every term of both losses (default: 1 / (C H W), as in the reference implementation)"""
    fake_reconstruction: Weight = 1e-8
    """introspective: weight of the reconstruction of fake pictures in the decoder's loss
    (gamma_r of the reference implementation, there 1e-8)"""
    gradient_penalty: Weight = 0.0
    """weight of (|dD/dx| - 1)^2 between real and generated pictures (Gulrajani et al. 2017, arXiv 1704.00028: 10)"""
    lecam: Weight = 0.0
    """weight of the squared distance of the discriminator's logits from a moving average of those of the other side
    (default 0; Tseng et al. 2021, arXiv 2104.03310: 0.3 for BigGAN on CIFAR)"""
    lecam_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """share of that average that a step keeps (Tseng et al. 2021: 0.99)"""
    diff_augment: tuple[Literal["color", "translation", "cutout"], ...] = ()
    """vaegan, gan: random alterations of real and fake pictures alike before the discriminator, which gradients pass
    (default none; Zhao et al. 2020, arXiv 2006.10738: all three for small data sets)"""
    equilibrium: Weight = 0.0
    """vaegan, gan where decoder and discriminator both learn: hold back the one that is too far ahead, by the
    discriminator's cross-entropy on real and on fake pictures against this; 0: never (Larsen et al. 2016, their code:
    0.68)"""
    equilibrium_margin: Weight = 0.35
    """distance from `equilibrium` at which a player is held back (their code: 0.35)"""


ObjectiveName = Literal["vae", "gan", "vaegan", "introspective"]


class Phase(Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
    """name of the phase in logs, history and checkpoints"""
    objective: ObjectiveName
    """what the phase minimises"""
    images: Positive
    """budget: images that the phase trains on"""
    train: Annotated[tuple[NetworkName, ...], Field(min_length=1)] | None = None
    """networks that learn (default: all that the objective trains); the others are frozen"""
    settings: dict[str, Any] = {}
    """keys of `objective` that differ in this phase"""
    learning_rate_scale: Rate = 1.0
    """factor on every learning rate in this phase"""


class OptimizerSection(Section):
    learning_rate: Rate = 1e-3
    """Adam's learning rate for every network that has none of its own"""
    encoder_learning_rate: Rate | None = None
    """learning rate of the encoder (default: learning_rate)"""
    decoder_learning_rate: Rate | None = None
    """learning rate of the decoder (default: learning_rate)"""
    discriminator_learning_rate: Rate | None = None
    """learning rate of the discriminator (default: learning_rate)"""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment"""
    eps: Rate = 1e-8
    """Adam's epsilon"""
    weight_decay: Weight = 0.0
    """decoupled weight decay (AdamW)"""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """shape of the learning rate over a phase, after the warm-up"""
    lr_decay_start: Fraction = 0.0
    """part of the phase that passes before the rate begins to fall"""
    lr_warmup_images: Count = 0
    """images over which the rate rises from zero at the start of a phase"""
    max_grad_norm: Weight = 0.0
    """largest gradient norm per network; 0 does not clip"""

    def rate_of(self, network: NetworkName) -> float:
        """Learning rate of a network."""
        own: float | None = getattr(self, f"{network}_learning_rate")
        return self.learning_rate if own is None else own


class EmaSection(Section):
    half_life_images: Count = 40_000
    """images after which an old weight counts half in the average; 0 keeps no average"""
    ramp_up: Weight = 0.05
    """the half-life is at most this share of the images seen (0: no ramp-up)"""


class Config(Section):
    """The tree itself. `preset` is where it started from and is informative only."""

    preset: str | None = None
    """preset that the configuration started from"""
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelSection = MlpModel()
    objective: ObjectiveSection = ObjectiveSection()
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = (Phase(name="vae", objective="vae", images=100_000),)
    optimizer: OptimizerSection = OptimizerSection()
    ema: EmaSection = EmaSection()
    training: TrainingSection = TrainingSection()
    reporting: ReportingSection = ReportingSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    cluster: ClusterSection = ClusterSection()

    @property
    def total_images(self) -> int:
        """Budget of the whole run: each phase is rounded up to whole batches."""
        return sum(self.phase_images(phase) for phase in self.phases)

    def phase_images(self, phase: Phase) -> int:
        """Images that a phase really trains on: its budget rounded up to whole batches."""
        return -(-phase.images // self.training.batch_size) * self.training.batch_size

    @property
    def streams(self) -> int:
        """Streams of the order: as set, or the largest divisor of the global batch up to 64."""
        if self.data.streams is not None:
            return self.data.streams
        batch = self.training.batch_size
        return max(s for s in range(1, min(batch, MAX_STREAMS) + 1) if batch % s == 0)

    def objective_of(self, phase: Phase) -> ObjectiveSection:
        """Objective settings of a phase: the tree's, with the phase's own keys on top."""
        return merge_section(self.objective, phase.settings)

    @field_validator("phases")
    @classmethod
    def _unique_phase_names(cls, phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
        names = [phase.name for phase in phases]
        if len(set(names)) < len(names):
            raise ValueError(f"two phases share a name in {names}; give each its own")
        return phases

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """Numbers of workers that the run may have: those of the range that share out streams and batch evenly."""
        cluster = self.cluster
        sizes = range(cluster.fewest_workers, cluster.most_workers + 1)
        return tuple(size for size in sizes if not self._misfit("", size))

    def _misfit(self, key: str, workers: int) -> str:
        """Why that many workers cannot train this; empty if they can."""
        batch, streams, accumulation = self.training.batch_size, self.streams, self.training.gradient_accumulation_steps
        if workers > streams:
            return (
                f"{key}={workers} is more than the {streams} streams; set data.streams to a multiple of "
                f"{workers} that divides training.batch_size={batch}, or use fewer workers"
            )
        if streams % workers:
            return (
                f"{key}={workers} does not divide the {streams} streams; set {key} to a divisor "
                f"of {streams}, or data.streams to a multiple of {workers}"
            )
        if (batch // workers) % accumulation:
            return (
                f"training.gradient_accumulation_steps={accumulation} does not divide the {batch // workers} images "
                f"per worker; choose a divisor"
            )
        group, share = getattr(self.model, "minibatch_std", 0), batch // workers // accumulation
        if group and share % group and any(phase.objective in ("gan", "vaegan") for phase in self.phases):
            return (
                f"model.minibatch_std={group} does not divide the {share} images that a worker takes at a time "
                f"(training.batch_size={batch} / {key}={workers} / gradient_accumulation_steps="
                f"{accumulation}); choose a divisor of {share}"
            )
        return ""

    @model_validator(mode="after")
    def _divisible(self) -> "Config":
        batch, streams = self.training.batch_size, self.streams
        if batch % streams:
            raise ValueError(
                f"data.streams={streams} does not divide training.batch_size={batch}; choose a divisor of {batch}"
            )
        # Of a range both ends must fit; what lies between them is used where it fits.
        workers = self.cluster.workers
        ends = [("", workers)] if isinstance(workers, int) else [(".min", workers.min), (".max", workers.max)]
        for end, number in ends:
            if misfit := self._misfit(f"cluster.workers{end}", number):
                raise ValueError(misfit)
        for phase in self.phases:
            try:
                self.objective_of(phase)
            except ValidationError as error:
                raise PhaseSettingsError(phase.name, error) from None
        return self


def merge_tree(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` laid over `tree`: dictionaries merge, everything else replaces."""
    merged = dict(tree)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge_tree(merged[key], value)
        else:
            merged[key] = value
    return merged


def merge_section(section: SectionT, changes: dict[str, Any]) -> SectionT:
    """A section with some keys changed, validated anew."""
    if not changes:
        return section
    return type(section).model_validate(merge_tree(section.model_dump(), changes))
