# The server in a container; nbs/10_serving.vllm.ipynb says how it is used, tests/test_docker.py tries each line.
FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d AS build
# An index with torch built for CPUs alone, some gigabytes smaller; left empty, PyPI's, which has CUDA and runs without.
ARG TORCH_INDEX=""
# Extras of the package, e.g. lora,quant
ARG EXTRAS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/llm_distill && mkdir /cache
COPY constraints.txt ./
RUN /opt/llm_distill/bin/python -m pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY settings.ini setup.py pyproject.toml README.md LICENSE ./
COPY llm_distill ./llm_distill
RUN /opt/llm_distill/bin/python -m pip install -c constraints.txt ".${EXTRAS:+[$EXTRAS]}" && \
    /opt/llm_distill/bin/python -m pip check

FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d
COPY --from=build /opt/llm_distill /opt/llm_distill
COPY --from=build --chown=10001:10001 /cache /cache
ENV PATH=/opt/llm_distill/bin:/usr/local/bin:/usr/bin:/bin PYTHONUNBUFFERED=1
# Torch asks for a name and a home, which a bare number has not.
ENV USER=server HOME=/cache LLM_DISTILL_HOME=/cache/llm_distill HF_HOME=/cache/huggingface
# For the NVIDIA runtime; without it they do nothing.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Beyond the container; without LLM_DISTILL_API_KEY or LLM_DISTILL_API_KEY_FILE the server refuses to start.
ENV HOST=0.0.0.0 PORT=8000 HF_MODEL=/model
USER 10001:10001
WORKDIR /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 CMD ["python", "-c", "import http.client as h, os, sys; c = h.HTTPConnection('127.0.0.1', int(os.environ['PORT']), timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
CMD ["llm-distill", "serve"]
