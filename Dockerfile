# soar_mega on NVIDIA's PyTorch image, which brings torch, Transformer Engine, apex and DALI:
#   docker build -t soar_mega .
#   docker run --rm --gpus all --ipc=host soar_mega python tools/doctor.py configs/sd35_medium_soar.yaml
# It has not been built or run yet.
#
# torch must be within pyproject.toml's 2.11 to 2.13. What the tags of 2026 have: torch.__version__ in
# public logs of runs in them, and for 26.02, 26.05 and 26.06 NVIDIA's release notes as others quote
# them; we could not read the notes themselves. 26.02 to 26.07 have Python 3.12.
#   26.02, 26.03  2.11.0a0    26.04, 26.05  2.12.0a0    26.06, 26.07  2.13.0a0    26.08  2.14.0a0
# 26.06 (2.13.0a0+8145d630e8, CUDA 13.3, driver 580 or newer) is nearest to the 2.13 of our tests. Which
# Transformer Engine, apex and DALI it has we did not find for certain (one log has Transformer Engine
# 2.16): `tools/doctor.py` lists what is there, and settings that need what is not say so.
ARG BASE_TAG=26.06-py3
FROM nvcr.io/nvidia/pytorch:${BASE_TAG}

# Extras of pyproject.toml besides gpu and dali, which the image has.
ARG EXTRAS="parquet wandb"
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/soar_mega

# Dependencies first: this layer stays when only our code changes.
COPY pyproject.toml constraints.txt ./
COPY soar_mega/__init__.py soar_mega/
COPY soar_mega/install/__init__.py soar_mega/install/requirements.py soar_mega/install/
COPY tools/image_requirements.py tools/
# The image's torch is a pre-release to pip ("2.13.0a0+..."), which torch>=2.11 does not take: so torch
# is never asked for. PIP_CONSTRAINT is NVIDIA's list of all packages, also of those that need to be
# newer; ours pins torch and NVIDIA's packages as strictly.
RUN version() { python -c 'import torch; print(torch.__version__)'; }; \
    before="$(version)"; work="$(mktemp -d)"; export PYTHONPATH=.; \
    python tools/image_requirements.py --out "$work" --extras $EXTRAS; \
    env -u PIP_CONSTRAINT python -m pip install --no-cache-dir --break-system-packages \
      -c "$work/constraints.txt" -r "$work/requirements.txt" pytest; \
    python tools/image_requirements.py --out "$work" --check; \
    after="$(version)"; rm -r "$work"; \
    if [[ "$after" != "$before" ]]; then echo "torch was $before, is $after" >&2; exit 1; fi

COPY README.md LICENSE ./
COPY soar_mega soar_mega
COPY tools tools
COPY configs configs
COPY assets assets
COPY slurm slurm
COPY tests tests
# Readable by whoever runs it (apptainer and enroot run as the user), whatever the checkout's umask.
# A build has no GPU, so the help is the most that the doctor can give here.
RUN env -u PIP_CONSTRAINT python -m pip install --no-cache-dir --break-system-packages --no-deps -e .; \
    chmod -R a+rX .; \
    python tools/doctor.py --help >/dev/null
