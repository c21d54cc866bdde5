# Images for the nodes of a cluster: Ray's own image, the packages of deploy/requirements-node.txt,
# MANTiS and its configs. `cpu` is for heads and data nodes, `gpu` for training.
#   docker build --target gpu --tag <registry>/mantis:gpu .
#   docker build --target cpu --tag <registry>/mantis:cpu .
# Each `FROM rayproject/ray` must have the version of `ray==` in requirements.lock.
# tests/deploy/test_dockerfile.py checks this.

FROM rayproject/ray:2.60.0-py311-cpu AS wheel
COPY --chown=ray pyproject.toml README.md LICENSE /home/ray/source/
COPY --chown=ray mantis_core /home/ray/source/mantis_core
COPY --chown=ray mantis_lite /home/ray/source/mantis_lite
COPY --chown=ray data_prep /home/ray/source/data_prep
COPY --chown=ray pipelines /home/ray/source/pipelines
COPY --chown=ray tune_spaces /home/ray/source/tune_spaces
RUN uv build --wheel --out-dir /home/ray/wheel /home/ray/source


FROM rayproject/ray:2.60.0-py311-cpu AS cpu
COPY --chown=ray deploy/requirements-node.txt /home/ray/mantis/
# The same versions without CUDA: torch comes from PyTorch's own index.
RUN grep -vE '^(nvidia-|cuda-|triton==)' /home/ray/mantis/requirements-node.txt > /tmp/cpu.txt \
    && uv pip install --system --no-cache --compile-bytecode --torch-backend cpu -r /tmp/cpu.txt \
    && rm /tmp/cpu.txt
COPY --from=wheel --chown=ray /home/ray/wheel /home/ray/mantis/wheel
RUN uv pip install --system --no-cache --no-deps /home/ray/mantis/wheel/*.whl
COPY --chown=ray configs /home/ray/mantis/configs
USER 1000


# torch brings its own CUDA libraries, so that the image needs the driver of its machine only and
# not the CUDA toolkit of Ray's GPU image.
FROM rayproject/ray:2.60.0-py311-cpu AS gpu
# They make a container runtime hand over the GPUs; NVIDIA's own images set them too:
# https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/docker-specialized.html
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --chown=ray deploy/requirements-node.txt /home/ray/mantis/
RUN uv pip install --system --no-cache --compile-bytecode \
    -r /home/ray/mantis/requirements-node.txt
COPY --from=wheel --chown=ray /home/ray/wheel /home/ray/mantis/wheel
RUN uv pip install --system --no-cache --no-deps /home/ray/mantis/wheel/*.whl
COPY --chown=ray configs /home/ray/mantis/configs
USER 1000
