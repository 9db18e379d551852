#!/bin/sh
# The browser test drives Debian's Chromium. Where it cannot be installed, that one test is skipped and says so.
command -v chromium >/dev/null 2>&1 && exit 0
if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
    (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) >/dev/null 2>&1 && exit 0
fi
echo "no chromium here: the browser test will be skipped" >&2
