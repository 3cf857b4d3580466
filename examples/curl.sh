#!/bin/sh
# Penstock with nothing but curl: submit a job, follow it, lose the connection, go on, look at the result.
#
#     sh examples/curl.sh
#
# PENSTOCK_URL names another server than http://127.0.0.1:8000.
set -eu
url="${PENSTOCK_URL:-http://127.0.0.1:8000}"

# Submit. The answer comes at once, when the job is on disk; whoever has its id can read it.
job=$(curl -fsS "$url/v1/jobs" -d '{"prompt": "Once upon a time, a fox", "max_tokens": 24}' | cut -d'"' -f4)
echo "job: $job"

# Follow it as server-sent events, and lose the connection: head leaves after the third event.
curl -fsSN "$url/v1/jobs/$job/events" 2>/dev/null | grep --line-buffered '^data: ' | head -n 3

# Go on behind position 3. The stream ends by itself, after the event "done".
rest=$(curl -fsSN -H 'Last-Event-ID: 3' "$url/v1/jobs/$job/events")
printf '%s\n' "$rest" | grep '^data: '

# Who has seen the end gets an empty 204.
end=$(printf '%s\n' "$rest" | sed -n 's/^id: //p' | tail -n 1)
curl -fsS -o /dev/null -w 'behind the end: %{http_code}\n' "$url/v1/jobs/$job/events?after=$end"

# The result in one piece.
curl -fsS "$url/v1/jobs/$job"
echo
