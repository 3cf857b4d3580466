// Codex CLI, headless, over the responses API: a text, and a command that it runs by its tool.
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdtemp, readFile, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";

const { PENSTOCK_URL: url, PENSTOCK_MODEL: model } = process.env;
const program = fileURLToPath(new URL("./node_modules/.bin/codex", import.meta.url));

async function codex(question) {
  const folder = await mkdtemp(join(tmpdir(), "codex-"));
  const settings = `
model = "${model}"
model_provider = "penstock"
web_search = "disabled"
[model_providers.penstock]
name = "penstock"
base_url = "${url}/v1"
wire_api = "responses"
`;
  await writeFile(join(folder, "config.toml"), settings);
  await writeFile(join(folder, "greet.py"), 'def greet():\n    return "hello"\n');
  const options = ["exec", "--skip-git-repo-check", "--sandbox", "danger-full-access"];
  const said = await new Promise((resolve, reject) => {
    const where = { cwd: folder, env: { ...process.env, CODEX_HOME: folder }, timeout: 120_000 };
    const child = execFile(program, [...options, question], where, (error, stdout, stderr) =>
      error ? reject(new Error(`${error.message}\n${stdout}\n${stderr}`)) : resolve(stdout),
    );
    child.stdin.end();
  });
  return { said, file: await readFile(join(folder, "greet.py"), "utf8") };
}

test("a text", async () => {
  assert.match((await codex("Say 'good morning'.")).said, /good morning/);
});

test("a command that changes a file", async () => {
  const { said, file } = await codex("Use exec_command to run `sed -i s/hello/hallo/ greet.py`");
  assert.match(file, /hallo/);
  assert.match(said, /exited with code 0/);
});
