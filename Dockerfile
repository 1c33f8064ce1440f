# syntax=docker/dockerfile:1.7
#
#   docker build -t REGISTRY/vaegan-dist:0.1.0 .
#   docker build -t REGISTRY/vaegan-dist:0.1.0-gpu --build-arg VARIANT=gpu .
#
# VARIANT is the Ray image's own suffix: cpu, gpu, or one CUDA version such as cu128. PyTorch's wheels bring the CUDA
# libraries they need; the gpu image adds NVIDIA's system libraries for everything else.
# Another package index: --build-arg PIP_INDEX_URL=…, or, when it needs a password, --secret id=pip,src=pip.conf
# (an argument stays visible in the image's history, a secret does not).

ARG RAY_VERSION=2.60.0
ARG VARIANT=cpu

FROM rayproject/ray:${RAY_VERSION}-py311-${VARIANT} AS build
ARG RAY_VERSION
ARG EXTRAS=demo
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
# Root owns what runs, another user runs it: a job cannot change the code of the next one.
USER 0
WORKDIR /src
# An environment of its own: what Ray's image installed for itself is not what constraints.txt was tested with.
RUN python -m venv /opt/vaegan
COPY pyproject.toml constraints.txt ./
# This layer lasts until pyproject.toml or constraints.txt changes.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    python -c "import sys, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], *(r for e in sys.argv[1:] for r in project['optional-dependencies'][e]), sep='\n')" \
    ${EXTRAS} > requirements.txt \
    && /opt/vaegan/bin/python -m pip install --constraint constraints.txt --requirement requirements.txt
COPY README.md LICENSE ./
COPY vaegan_dist vaegan_dist
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    /opt/vaegan/bin/python -m pip install --no-deps . \
    && /opt/vaegan/bin/python -m pip check \
    && /opt/vaegan/bin/python -m pip uninstall --yes pip
# The nodes of a cluster must agree on Ray's version; it is better to hear so here than from a worker that cannot join.
RUN /opt/vaegan/bin/python -c "import sys, ray; sys.exit(ray.__version__ != '${RAY_VERSION}' and ray.__version__)" \
    && /opt/vaegan/bin/vaegan-dist --version
USER 1000:100

FROM rayproject/ray:${RAY_VERSION}-py311-${VARIANT}
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="vaegan-dist" \
      org.opencontainers.image.description="Distributed training of VAE-GANs with Ray Train" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.documentation="${SOURCE}/docs/kubernetes.md" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/vaegan /opt/vaegan
# Triton needs a C compiler when a job runs, for what starts its kernels (training.fused_norms, training.compile).
ARG VARIANT
USER 0
# hadolint ignore=DL3008
RUN test "${VARIANT}" = cpu || command -v gcc || command -v clang \
    || { apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; }
# Ray starts a job's command in the folder where `ray start` ran, so `python jobs/train.py` is found from here.
WORKDIR /opt/vaegan/app
COPY jobs jobs
COPY sweeps sweeps
ENV VIRTUAL_ENV=/opt/vaegan PATH=/opt/vaegan/bin:${PATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# By number, because Kubernetes can check only a number against runAsNonRoot.
USER 1000:100
