// Claude Code, headless, over the messages API: a text, and a command that it runs by its tool.
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdtemp, readFile, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";

const { PENSTOCK_URL: url, PENSTOCK_MODEL: model } = process.env;
const program = fileURLToPath(new URL("./node_modules/.bin/claude", import.meta.url));

async function claude(...question) {
  const folder = await mkdtemp(join(tmpdir(), "claude-"));
  await writeFile(join(folder, "greet.py"), 'def greet():\n    return "hello"\n');
  const settings = {
    ANTHROPIC_BASE_URL: url,
    ANTHROPIC_AUTH_TOKEN: "none",
    ANTHROPIC_MODEL: model,
    ANTHROPIC_SMALL_FAST_MODEL: model,
    CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: "1",
  };
  const said = await new Promise((resolve, reject) => {
    const where = { cwd: folder, env: { ...process.env, HOME: folder, ...settings }, timeout: 120_000 };
    const child = execFile(program, ["--print", ...question], where, (error, stdout, stderr) =>
      error ? reject(new Error(`${stdout}\n${stderr}\n${error.message}`)) : resolve(stdout),
    );
    child.stdin.end();
  });
  return { said, file: await readFile(join(folder, "greet.py"), "utf8") };
}

test("a text", async () => {
  assert.match((await claude("Say 'good morning'.")).said, /good morning/);
});

test("what it cost is told", async () => {
  const { said } = await claude("--output-format", "json", "Say 'good morning'.");
  const { is_error, stop_reason, usage } = JSON.parse(said);
  assert.deepEqual([is_error, stop_reason], [false, "end_turn"]);
  assert.ok(usage.input_tokens > 1000 && usage.output_tokens > 0);
});

test("a command that changes a file", async () => {
  const { file } = await claude("--allowedTools", "Bash", "--", "Use Bash to run `sed -i s/hello/hallo/ greet.py`");
  assert.match(file, /hallo/);
});

