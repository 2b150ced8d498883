#!/bin/sh
# Make a folder with the servers' Python files, each unpacked in a folder of its own, and an environment that imports them without a GPU.
# The tests here find it by LORATOOL_SERVED. Usage: sh tests/served/environment.sh FOLDER PYTHON (one that has torch, peft and transformers)
set -e
folder=$1 python=$2
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$folder/wheels"
for wheel in vllm==0.33.0 sglang==0.5.23 lmdeploy==0.18.0 exllamav3==1.6.5; do
    name=${wheel%%==*}
    "$python" -m pip download -q --no-deps -d "$folder/wheels" "$wheel"
    unzip -q -o "$folder"/wheels/"$name"-*.whl -x '*.so' -d "$folder/$name"
done
"$python" -m venv "$folder/served-venv"
echo "$site" > "$folder/served-venv/lib/$(ls "$folder/served-venv/lib")/site-packages/rest.pth"
pip="$folder/served-venv/bin/pip install -q --no-deps"
$pip transformers==5.20.0 compressed-tensors==0.17.0 torchvision==0.28.0 lark==1.2.2 'fastapi<0.137'
$pip cachetools blake3 py-cpuinfo starlette aiohttp multidict yarl frozenlist aiosignal propcache aiohappyeyeballs openai jiter sniffio \
    distro orjson prometheus_client prometheus-fastapi-instrumentator tiktoken partial-json-parser pyzmq msgspec mistral_common \
    pydantic_extra_types pycountry einops cloudpickle watchfiles python-json-logger pybase64 cbor2 ijson setproctitle oss-harmony \
    model-hosting-container-standards mcp six dill opentelemetry-api uvloop timm cffi pycparser soundfile mmengine-lite addict \
    termcolor yapf platformdirs tomli fire shortuuid
$pip --target "$folder/triton" triton==3.9.0
