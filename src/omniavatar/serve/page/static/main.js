// Puts the page together.
import { Problem, getFile, getJson, postForm, videoForm } from "./api.js";
import { Choices } from "./choices.js";
import { at, complain, el, passFocus } from "./dom.js";
import { Jobs } from "./jobs.js";
import { Plan, loadInfo, showProblem } from "./plan.js";
import { Portrait } from "./portrait.js";
import { bytes, fill, t } from "./strings.js";
import { setUpTalk, showTalk } from "./talk.js";
import { Voice } from "./voice.js";

const RETRY_MS = 1500;
let parts = {};
let request = null; // the idempotency key of a form that was sent, until the form changes

function form() {
  const { portrait, voice, choices } = parts;
  return {
    prompt: choices.prompt, model: choices.model.id, size: choices.size,
    extra_params: choices.settings, input_reference: portrait.file, audio_reference: voice.file,
  };
}

function changed() {
  request = null;
  const { portrait, choices, plan } = parts;
  if (!plan) return;
  at("packaged-note").hidden = !choices.model.packaged || !portrait.file || portrait.isExample;
  plan.refresh();
}

function tooLarge({ input_reference: portrait, audio_reference: voice }) {
  const size = portrait.size + (voice?.size ?? 0);
  const most = parts.info.upload_bytes;
  return size > most ? t("too_large", { size: bytes(size), most: bytes(most) }) : "";
}

async function make(event) {
  event.preventDefault();
  const values = form();
  complain("form-problem");
  if (!values.input_reference) {
    complain("portrait-problem", t("portrait_missing"), at("portrait-file"));
    at("portrait-file").focus();
    return;
  }
  if (!values.prompt) {
    complain("prompt-problem", t("prompt_missing"), at("prompt"));
    at("prompt").focus();
    return;
  }
  const large = tooLarge(values);
  if (large) {
    complain("form-problem", large);
    return;
  }
  const button = at("make");
  const from = document.activeElement;
  button.disabled = true;
  button.textContent = t("making");
  request ??= crypto.randomUUID();
  try {
    const video = await postForm("/v1/videos", videoForm(values), { headers: { "Idempotency-Key": request } });
    request = null;
    parts.jobs.show(video);
    await parts.jobs.refresh();
    passFocus(from, at("stage-title"));
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    showProblem(problem).focus();
  } finally {
    button.textContent = t("make");
    button.disabled = false;
  }
}

// Fills the form with what a video was made from.
async function reuse(id) {
  complain("form-problem");
  const lost = [];
  try {
    const used = await getJson(`/page/videos/${id}/settings`);
    parts.choices.set(used);
    for (const [name, part] of [["portrait", parts.portrait], ["voice", parts.voice]]) {
      if (used.files.includes(name)) part.use(await getFile(`/page/videos/${id}/${name}`, name, ""));
      else if (name === "portrait") lost.push(t(`missing_${name}`));
      else parts.voice.clear();
    }
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    complain("form-problem", problem.message);
    return;
  }
  at("plan-text").textContent = lost.length ? t("reused_partly", { missing: lost.join(", ") }) : t("reused");
  at("prompt").focus();
}

function setUpTabs() {
  const tabs = [at("tab-make"), at("tab-talk")];
  const choose = (chosen) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", String(tab === chosen));
      tab.tabIndex = tab === chosen ? 0 : -1;
      at(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
    showTalk(parts.portrait);
  };
  tabs.forEach((tab, place) => {
    tab.onclick = () => choose(tab);
    tab.onkeydown = ({ key }) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
      if (!step) return;
      const next = tabs[(place + step + tabs.length) % tabs.length];
      choose(next);
      next.focus();
    };
  });
}

function describeNote() {
  at("packaged-note").replaceChildren(el("p", {}, t("packaged_note")), el("pre", { tabIndex: 0, role: "region", "aria-label": t("tab_make") }, t("packaged_commands")));
}

async function begin() {
  fill(document);
  describeNote();
  let info;
  try {
    info = await loadInfo();
  } catch (problem) {
    at("offline").textContent = problem.message;
    at("offline").hidden = false;
    setTimeout(begin, RETRY_MS);
    return;
  }
  at("offline").hidden = true;
  at("about").textContent = t("about", { version: info.version });
  const portrait = new Portrait(changed);
  const voice = new Voice(changed, info.voice);
  const choices = new Choices(info, changed);
  const jobs = new Jobs({ reuse, changed });
  parts = { info, portrait, voice, choices, jobs };
  parts.plan = new Plan(info, () => ({ form: form(), choices, voice }));
  at("form").onsubmit = make;
  setUpTabs();
  setUpTalk(info, portrait);
  if (info.example) await Promise.all([portrait.useExample(), voice.useExample()]);
  changed();
  await jobs.refresh();
  document.body.dataset.ready = "yes";
}

begin();
