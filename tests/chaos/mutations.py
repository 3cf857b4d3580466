"""What `tests.chaos.mutants` breaks, and the tests that must notice.

Each mutant is an exact replacement of text in a copy of ``src``.
"""

from __future__ import annotations

from dataclasses import dataclass

EMBEDDED = "penstock/brokers/embedded/"
BROKER, QUEUE, LOG, ROWS = (EMBEDDED + f"{name}.py" for name in ("broker", "queue", "log", "rows"))
STORE = EMBEDDED + "store.py"
WORKER = "penstock/worker/worker.py"
PLACEMENT = "penstock/worker/placement.py"
STANDBY = "penstock/engines/host/standby.py"
RULES = "tests/unit/worker/test_rules.py"
PLACED = "tests/unit/worker/test_placement.py"
CONTRACT = "tests/contract/test_embedded_broker.py"


@dataclass(frozen=True)
class Mutant:
    """``edits``: (file below src, old text, new text); ``tests``: arguments for pytest."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


REDIS = "penstock/brokers/redis/"
LUA = REDIS + "lua/"
REDIS_CONTRACT = "tests/contract/test_redis_broker.py"
HOLDS = 'job and job.s == "running" and tonumber(job.a) == attempt and job.t == tenant'

FENCED = "if running is None or running.attempt != lease.attempt or running.tenant != lease.tenant:"

WRITTEN = "self._logs.write(tx, runs, now)"
CLOSED = "self._logs.close(job, ended)\n\n        tx.then.append(then)\n"
FAIR = "ORDER BY priority, lanes.counter, lanes.served LIMIT 1"
FIFO = (
    "ORDER BY priority, (SELECT min(seq) FROM jobs WHERE jobs.tenant = lanes.tenant AND jobs.model = lanes.model "
    "AND jobs.priority = lanes.priority AND status = 'queued') LIMIT 1"
)
OF_TENANT = '"id = ? AND tenant = ?", job, tenant)'
BLAMED = "beside = len(blamed)"
UNIQUE = "CREATE UNIQUE INDEX IF NOT EXISTS jobs_key"

MUTANTS = [
    Mutant(
        "fence removed",
        ((BROKER, FENCED, "if running is None or running.tenant != lease.tenant:"),),
        (CONTRACT, "-k", "AppendContract or LeaseContract or older_attempt or released_lease or zombie"),
    ),
    Mutant(
        "position dedupe removed",
        (
            (
                BROKER,
                "fresh = len(append.ids) - (running.head - append.position + 1)",
                "fresh = len(append.ids)",
            ),
            (
                BROKER,
                "tokens = append.run.after(running.head)",
                "tokens = msgspec.structs.replace(append.run, position=running.head + 1)",
            ),
        ),
        (CONTRACT, "-k", "append or overlapping or rewritten or repeated"),
    ),
    Mutant(
        "a gap is accepted",
        ((BROKER, "if append.position > running.head + 1:", "if False:"),),
        (CONTRACT, "-k", "beyond_the_head"),
    ),
    Mutant(
        "delivery before commit",
        ((BROKER, WRITTEN, WRITTEN + "\n        self._logs.publish(runs)\n        runs.clear()"),),
        ("tests/unit/brokers/test_write_ahead.py",),
    ),
    Mutant(
        "the end is delivered before commit",
        ((BROKER, CLOSED, CLOSED.replace("tx.then.append(then)", "then()")),),
        ("tests/unit/brokers/test_write_ahead.py",),
    ),
    Mutant(
        "acknowledged before commit",
        (
            (
                STORE,
                "            if conn.total_changes != unchanged:\n",
                "            for future, result, failure in outcomes:\n"
                "                if failure is None and not future.done():\n"
                "                    future.set_result(result)\n"
                "            if conn.total_changes != unchanged:\n",
            ),
        ),
        ("tests/unit/brokers/test_write_ahead.py",),
    ),
    Mutant(
        "idempotency ignored by the broker",
        (
            (BROKER, "if job.idempotency_key is not None:", "if False:"),
            ("penstock/brokers/embedded/schema.sql", UNIQUE, UNIQUE.replace("UNIQUE ", "")),
        ),
        (CONTRACT, "-k", "key or duplicate"),
    ),
    Mutant(
        "idempotency ignored by the gateway",
        (
            (
                "penstock/gateway/dialects/fields.py",
                'key = call.headers.get("idempotency-key") or body.request_id',
                "key = None",
            ),
        ),
        ("tests/integration/test_api_jobs.py", "-k", "TestIdempotency"),
    ),
    Mutant(
        "fairness replaced by FIFO",
        ((QUEUE, FAIR, FIFO),),
        (CONTRACT, "-k", "backlogged or weights or flood or one_claim_shares"),
    ),
    Mutant(
        "priority classes ignored",
        ((QUEUE, FAIR, FAIR.replace("priority, ", "")),),
        (CONTRACT, "-k", "priority"),
    ),
    Mutant(
        "detokeniser without its UTF-8 buffer",
        (
            (
                "penstock/engines/text/detokenize.py",
                "        text, used = utf_8_decode(data, \"replace\", False)\n        self._held = data[used:]\n",
                "        text = data.decode(\"utf-8\", \"replace\")\n",
            ),
        ),
        ("tests/unit/engines/text/test_text.py",),
    ),
    Mutant(
        "tenant check dropped on reading",
        (
            (ROWS, OF_TENANT, OF_TENANT.replace("tenant = ?", "? <> ''")),
            (LOG, "if live is None or live.tenant != tenant:", "if live is None:"),
        ),
        (CONTRACT, "-k", "foreign or tenant"),
    ),
    Mutant(
        "tenant check dropped on writing",
        ((BROKER, FENCED, "if running is None or running.attempt != lease.attempt:"),),
        (CONTRACT, "-k", "tenant or foreign"),
    ),
    Mutant(
        "tenant dropped by the gateway",
        (("penstock/gateway/jobs.py", "return self.identity.tenant", 'return "default"'),),
        ("tests/unit/gateway",),
    ),
    Mutant(
        "nobody asks for the right that a route needs",
        (("penstock/gateway/operation.py", "identity.require(self.operation.scope)", "pass"),),
        ("tests/unit/gateway/test_operation.py",),
    ),
    Mutant(
        "what fails before its route fails in our words",
        (("penstock/gateway/http.py", 'scope.get("penstock.dialect", NATIVE)', "NATIVE"),),
        ("tests/unit/gateway/test_operation.py",),
    ),
    Mutant(
        "a route that is for those with a header answers everybody",
        (("penstock/gateway/app.py", "return not header or any(", "return True or any("),),
        ("tests/unit/gateway/test_operation.py",),
    ),
    Mutant(
        "a heartbeat with a blank line",
        (("penstock/gateway/sse.py", 'PING = b": ping\\n"', 'PING = b": ping\\n\\n"'),),
        ("tests/integration/test_api_sse.py", "-k", "TestHeartbeat"),
    ),
    Mutant(
        "text that is not ASCII on the wire",
        (
            (
                "penstock/gateway/sse.py",
                "json_string: Callable[[str], str] = json.encoder.encode_basestring_ascii",
                "json_string: Callable[[str], str] = json.encoder.encode_basestring",
            ),
        ),
        ("tests/unit/gateway",),
    ),
    Mutant(
        "redis: fence removed",
        ((LUA + "lib.lua", HOLDS, HOLDS.replace(" and tonumber(job.a) == attempt", "")),),
        (REDIS_CONTRACT, "-k", "TestRedisBroker and (Append or Lease or older_attempt or zombie)"),
    ),
    Mutant(
        "redis: position dedupe removed",
        (
            (LUA + "append.lua", "if count > 0 and last > head then", "if count > 0 then"),
            (
                LUA + "append.lua",
                "local head, last = tonumber(job.h), position + count - 1",
                "local head, last = tonumber(job.h), tonumber(job.h) + count",
            ),
        ),
        (REDIS_CONTRACT, "-k", "TestRedisBroker and (append or overlapping or rewritten or repeated)"),
    ),
    Mutant(
        "redis: lease check removed",
        ((LUA + "lib.lua", HOLDS, HOLDS.replace('job.s == "running" and ', "")),),
        (REDIS_CONTRACT, "-k", "TestRedisBroker and (lost_lease or released_lease or after_the_end)"),
    ),
    Mutant(
        "redis: a gap is accepted",
        ((LUA + "append.lua", "elseif position > tonumber(job.h) + 1 then", "elseif false then"),),
        (REDIS_CONTRACT, "-k", "TestRedisBroker and beyond_the_head"),
    ),
    Mutant(
        "redis: tenant check dropped on reading",
        (
            (LUA + "read.lua", "if owner ~= tenant then", "if not owner then"),
            (LUA + "get.lua", "if not job or job.t ~= tenant then", "if not job then"),
        ),
        (REDIS_CONTRACT, "-k", "TestRedisBroker and (foreign or tenant)"),
    ),
    Mutant(
        "redis: tenant check dropped on writing",
        ((LUA + "lib.lua", HOLDS, HOLDS.replace(" and job.t == tenant", "")),),
        (REDIS_CONTRACT, "-k", "TestRedisBroker and (foreign or tenant)"),
    ),
    Mutant(
        "redis: a lost lease without a new attempt",
        ((LUA + "claim.lua", "tonumber(job.a) + 1", "math.max(1, tonumber(job.a))"),),
        (REDIS_CONTRACT, "-k", "TestRedisBroker and (attempt or zombie or lease)"),
    ),
    Mutant(
        "redis: acknowledged before it is written",
        (
            (
                REDIS + "broker.py",
                "verdicts = await shard.run(scripts.Append(appends=rows, expired=_EXPIRED, blobs=blobs))",
                "shard.post(scripts.Append(appends=rows, expired=_EXPIRED, blobs=blobs))\n"
                '        verdicts = [b"ok"] * len(rows)',
            ),
        ),
        (REDIS_CONTRACT, "-k", "TestRedisBroker and (durable or Append or older_attempt)"),
    ),
    Mutant(
        "redis: idempotency ignored",
        ((LUA + "submit.lua", "  if print then", "  if false then"),),
        (REDIS_CONTRACT, "-k", "TestRedisBroker and (key or duplicate)"),
    ),
    Mutant(
        "redis: fairness ignored",
        ((LUA + "lib.lua", "if cost == 0 then return end", "if true then return end"),),
        (REDIS_CONTRACT, "-k", "TestRedisBroker and (backlogged or weights or flood or one_claim_shares)"),
    ),
    Mutant(
        "redis: an arriving tenant is not lifted",
        ((LUA + "lib.lua", "      if floor > value then", "      if false then"),),
        (REDIS_CONTRACT, "-k", "TestRedisBroker and (credit or newcomer)"),
    ),
    Mutant(
        "redis: nobody is woken",
        ((LUA + "lib.lua", 'local claimant = call("ZPOPMIN", idle)[1]', "local claimant"),),
        ("tests/integration/redis_broker",),
    ),
    Mutant(
        "what was claimed when the drain began is forgotten",
        ((WORKER, "self._pending.extend(self._claim.result())  # it was", "pass  # it was"),),
        ("tests/unit/worker/test_worker.py",),
    ),
    Mutant(
        "cleared counts as absolved",
        ((WORKER, "beside = len(blamed) if len(blamed) == len(self._active) else max(2, len(blamed))", BLAMED),),
        (RULES,),
    ),
    Mutant(
        "a busy worker always takes suspects",
        ((WORKER, "if self._has_bystanders() and now < self._suspects_at:", "if False:"),),
        (RULES,),
    ),
    Mutant(
        "pending leases that were lost are begun",
        ((WORKER, "for lease in self._pending if lease.key not in lost)", "for lease in self._pending)"),),
        (RULES,),
    ),
    Mutant(
        "suspects and others join together",
        (
            (WORKER, "self._pending.extend(suspects or leases)", "self._pending.extend(leases)"),
            (WORKER, "if suspects and len(suspects) < len(leases):", "if False:"),
            (WORKER, "            return not trials\n", "            return True\n"),
        ),
        (RULES,),
    ),
    Mutant(
        "the crash limit of a trial is never reached",
        ((WORKER, " and self.lease.job.crashes < TRIAL_CRASHES", ""),),
        (RULES,),
    ),
    Mutant(
        "the reserved wait is ignored",
        ((WORKER, "RESERVED_WAIT if free <= info.reserve else PARTIAL_WAIT", "PARTIAL_WAIT"),),
        (RULES,),
    ),
    Mutant(
        "n choices take one slot",
        ((WORKER, "sum(active.lease.job.request.n for active in self._active.values())", "len(self._active)"),),
        (RULES,),
    ),
    Mutant(
        "dropped jobs are not aborted in the engine",
        ((WORKER, "                self._engine.abort(key)\n", ""),),
        (RULES,),
    ),
    Mutant(
        "a heartbeat appends nothing",
        ((WORKER, "verdicts = await self._broker.append([Append(lease, 0) for lease in leases])", "verdicts = {}"),),
        (RULES,),
    ),
    Mutant(
        "tokens are lost while the broker is away",
        ((WORKER, "                await asyncio.sleep(pause)\n\n", "                return {}\n\n"),),
        (RULES,),
    ),
    Mutant(
        "a busy model never makes room",
        ((PLACEMENT, "self._now - _since(model) >= self._policy.swap_after", "False"),),
        (PLACED,),
    ),
    Mutant(
        "small models overtake a large one that is due",
        ((PLACEMENT, "self._reserved += target", "pass"),),
        (PLACED,),
    ),
    Mutant(
        "the budget counts no spares",
        ((PLACEMENT, "(self.held_spares + self.phase.loaded - self.takes_spare)", "self.phase.loaded"),),
        (PLACED,),
    ),
    Mutant(
        "two models count on the same room for their spares",
        ((PLACEMENT, "spares=ready, held_spares=count)", "spares=ready)"),),
        (PLACED,),
    ),
    Mutant(
        "a spare is loaded anew",
        ((STANDBY, "next((spare for spare in self._spares if spare.alive), None)", "None"),),
        ("tests/unit/engines/host/test_standby.py", "-k", "TestSpares"),
    ),
    Mutant(
        "forgetting reaches another tenant's job",
        (
            (
                BROKER,
                "ended = self._cancel(tenant, job, tx)",
                'owner = tx.conn.execute("SELECT tenant FROM jobs WHERE id = ?", (job,)).fetchone()\n'
                "            ended = self._cancel(owner[0] if owner else tenant, job, tx)",
            ),
        ),
        (CONTRACT, "-k", "idempotent_and_nobody_elses"),
    ),
    Mutant(
        "jobs of batches take every slot",
        (
            (QUEUE, "Priority.BATCH if free > demand.reserve else Priority.NORMAL", "Priority.BATCH"),
            (QUEUE, "reserve = demand.reserve if row.priority == Priority.BATCH else 0", "reserve = 0"),
        ),
        (CONTRACT, "-k", "reserve"),
    ),
    Mutant(
        "a batch's line has no key of its own",
        (("penstock/gateway/batches/line.py", 'idempotency_key=f"{batch.id}/{number}",', "idempotency_key=None,"),),
        ("tests/unit/gateway/test_batches.py",),
    ),
    Mutant(
        "a resumed response repeats an event",
        (
            (
                "penstock/gateway/dialects/responses/stream.py",
                "if event.sequence_number <= self._after:",
                "if event.sequence_number < self._after:",
            ),
        ),
        ("tests/unit/gateway/test_responses.py",),
    ),
    Mutant(
        "another site's page may change things",
        (("penstock/gateway/middleware.py", 'return site not in ("same-origin", "none")', "return False"),),
        ("tests/unit/gateway/test_app.py", "tests/integration/test_api_page.py"),
    ),
    Mutant(
        "a replica's file is asked for before it can be synced",
        ((REDIS + "server.py", "return [received, (\"WAITAOF\"", "return [(\"WAITAOF\""),),
        ("tests/integration/redis_broker", "-k", "regular_report or is_asked"),
    ),
    Mutant(
        "a start does not wait for replicas",
        ((REDIS + "connection.py", "self._check_replicas(await run_once(", "(await run_once("),),
        ("tests/integration/redis_broker", "-k", "start_without_confirmation"),
    ),
    Mutant(
        "replicas that do not confirm are not waited for",
        ((REDIS + "connection.py", "self._check_replicas(reply)  # else", "pass  # else"),),
        ("tests/integration/redis_broker", "-k", "survives_the_master or joins_later"),
    ),
    Mutant(
        "one call's exception is the engine's death",
        (
            (
                "penstock/engines/child/main.py",
                "except Exception as error:\n                        if not isinstance(error, PenstockError):",
                "except PenstockError as error:\n                        if not isinstance(error, PenstockError):",
            ),
        ),
        ("tests/unit/engines/child/test_child.py",),
    ),
    Mutant(
        "a request ends with the first of its choices",
        (("penstock/engines/child/choices.py", "        if self._open:\n", "        if False:\n"),),
        ("tests/unit/engines/child/test_choices.py",),
    ),
    Mutant(
        "the death of an engine is no event",
        (
            (
                "penstock/engines/host/process.py",
                "            if self._watchdog is not None:\n                self._died",
                "            if False:\n                self._died",
            ),
        ),
        ("tests/unit/engines/host/test_process.py",),
    ),
    Mutant(
        "slots are counted in jobs",
        (("penstock/core/job.py", "return min(self.n, all)", "return 1"),),
        (CONTRACT, "-k", "slot or wide"),
    ),
    Mutant(
        "what cannot be read rests a replica",
        (
            (
                "penstock/engines/upstream/replicas.py",
                "if error.garbled:  # whether",
                "if error.garbled and replica.failed(why):  # whether",
            ),
        ),
        ("tests/unit/engines/upstream", "-k", "garbled or no_reply"),
    ),
    Mutant(
        "null is not the default",
        (
            (
                "penstock/gateway/lenient.py",
                "if each is not None or name not in known or known[name].required or takes_null(known[name].type)",
                "if True",
            ),
        ),
        ("tests/unit/gateway/test_bodies.py",),
    ),
    Mutant(
        "3.0 is no integer",
        (("penstock/gateway/lenient.py", "isinstance(value, float) and value.is_integer()", "False"),),
        ("tests/unit/gateway/test_bodies.py",),
    ),
    Mutant(
        "HEAD of a stream follows it",
        (("penstock/gateway/sse.py", 'if scope["method"] == "HEAD":', "if False:"),),
        ("tests/integration/test_http_wire.py", "-k", "TestHead"),
    ),
    Mutant(
        "a client that leaves is not seen behind what it sent",
        (
            (
                "penstock/server.py",
                "self.cycle = self._answering  # whom uvicorn tells",
                "pass  # whom uvicorn tells",
            ),
        ),
        ("tests/integration/test_http_wire.py", "-k", "TestPipelining"),
    ),
    Mutant(
        "the page takes a token twice",
        (
            ("penstock/web/js/log.js", "if (position <= this.head) return false;", ""),
            ("penstock/web/js/log.js", "if (position !== this.head + 1)", "if (position > this.head + 1)"),
        ),
        ("tests/browser/test_survival.py", "-k", "got_lost"),
    ),
    Mutant(
        "what a token is part of is lost",
        ((BROKER, "tokens = append.run.after(running.head)",
          "tokens = msgspec.structs.replace(append.run.after(running.head), phases=None)"),),
        (CONTRACT, "-k", "PhaseContract or Phase or phase or thought"),
    ),
    Mutant(
        "thoughts are counted again by every append",
        ((BROKER, "max(running.reasoning_tokens, append.reasoning_tokens)",
          "running.reasoning_tokens + append.reasoning_tokens"),),
        (CONTRACT, "-k", "PhaseContract or Phase or phase or thought"),
    ),
    Mutant(
        "a stop string holds in a thought",
        (("penstock/engines/text/reply.py", "            if phase is Phase.TEXT:\n                part, met",
          "            if True:\n                part, met"),),
        ("tests/unit/engines/text/test_reply.py",),
    ),
    Mutant(
        "a call in a thought is a call",
        (("penstock/engines/text/formats/family.py", "(*thoughts.ends, *thoughts.until)), Phase.REASONING)",
          "(*thoughts.ends, *thoughts.until, '<tool_call>')), Phase.REASONING)"),),
        ("tests/unit/engines/text/test_reply.py", "tests/unit/engines/text/test_formats.py"),
    ),
    Mutant(
        "a reader who comes back has forgotten the calls",
        (("penstock/gateway/dialects/openai/stream.py", 'self._calls[choice].push(parts.get(Phase.TOOL, ""))',
          "pass"),),
        ("tests/unit/gateway/test_reasoning.py",),
    ),
    Mutant(
        "what is pulled is not compared with the catalogue",
        (("penstock/models/fetch.py", "if found != sha256:", "if False:"),),
        ("tests/unit/models",),
    ),
]  # fmt: skip
