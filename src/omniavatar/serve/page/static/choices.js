// Model, words, intent, shape and advanced settings.
import { at, complain, el } from "./dom.js";
import { count, duration, t } from "./strings.js";

const SHAPES = ["16:9", "1:1", "9:16"];
const SAVED = "omniavatar-form";

export class Choices {
  constructor(info, changed) {
    this.models = info.models;
    this.changed = changed;
    const saved = load();
    at("model-row").hidden = this.models.length < 2;
    at("model").append(...this.models.map(({ id, packaged }) => el("option", { value: id }, packaged ? t("model_packaged", { id }) : id)));
    at("model").onchange = () => this.#useModel(at("model").value);
    at("prompt").oninput = () => {
      complain("prompt-problem", "", at("prompt"));
      this.#pressWords();
      this.#save();
    };
    this.set({ model: saved.model, prompt: saved.prompt, intent: saved.intent, size: saved.size, settings: saved.settings });
  }

  // Puts values into the form; what is missing gets its default.
  set({ model, prompt, intent, size = null, settings = {} }) {
    const known = this.models.find(({ id }) => id === model) ?? this.models[0];
    at("model").value = known.id;
    this.#useModel(known.id, false);
    at("prompt").value = prompt ?? known.prompt;
    const rest = { ...settings };
    const found = intent ?? Object.keys(known.intents).find((name) => matches(known.intents[name], settings)) ?? "balanced";
    if (!intent) for (const key of Object.keys(known.intents[found])) delete rest[key];
    this.#check("intent", found in known.intents ? found : "balanced");
    this.#check("shape", known.sizes.some((each) => each.size === size) ? size : this.#onlySize());
    for (const { key } of known.settings) at(`set-${key}`).value = rest[key] === undefined ? "" : [rest[key]].flat().join(", ");
    at("advanced").open = Object.keys(rest).some((key) => key !== "seed");
    this.#pressWords();
    this.#changed();
  }

  get prompt() {
    return at("prompt").value.trim();
  }

  get size() {
    return document.querySelector("[name=shape]:checked")?.value || null;
  }

  get intent() {
    return document.querySelector("[name=intent]:checked").value;
  }

  // Values of the advanced fields by configuration key.
  get own() {
    const found = {};
    for (const { key, kind } of this.model.settings) {
      const text = at(`set-${key}`).value.trim();
      if (text) found[key] = kind === "numbers" ? text.split(",").map(number) : ["whole", "number"].includes(kind) ? number(text) : text;
    }
    return found;
  }

  get settings() {
    return { ...this.model.intents[this.intent], ...this.own };
  }

  showTimes(times, measuring) {
    for (const [name, { steps, compute_seconds }] of Object.entries(times)) {
      at(`steps-${name}`).textContent = count(steps, "steps");
      const unknown = t(measuring ? "time_measuring" : "time_unknown");
      at(`time-${name}`).textContent = compute_seconds === null ? unknown : `≈ ${duration(compute_seconds)}`;
    }
  }

  #useModel(id, tell = true) {
    this.model = this.models.find((model) => model.id === id);
    at("prompt-hint").textContent = t(this.model.packaged ? "prompt_hint_packaged" : "prompt_hint");
    this.#drawWords();
    this.#drawIntents();
    this.#drawShapes();
    this.#drawSettings();
    this.#drawFixed();
    if (tell) this.#changed();
  }

  #drawWords() {
    at("words").replaceChildren(...Object.entries(this.model.words).map(([group, words]) => {
      const name = t(`words_${group}`);
      const chips = words.map((word) => el("button", { type: "button", className: "chip", "aria-pressed": "false", onclick: () => this.#toggle(word, words) }, word));
      return el("div", { role: "group", "aria-label": name, className: "words" }, el("span", { className: "words-name" }, name), ...chips);
    }));
  }

  #drawIntents() {
    at("intents").replaceChildren(...Object.keys(this.model.intents).map((name) => el("label", { className: "intent" },
      el("input", { type: "radio", name: "intent", value: name, checked: name === "balanced", onchange: () => this.#changed() }),
      el("span", { className: "intent-name" }, t(`intent_${name}`)),
      el("span", { className: "intent-time", id: `time-${name}` }),
      el("span", { className: "hint" }, t(`about_${name}`), " · ", el("span", { id: `steps-${name}` })))));
  }

  #drawShapes() {
    const { sizes } = this.model;
    const radio = (value, text, title, disabled = false) => el("label", { title, className: disabled ? "off" : "" },
      el("input", { type: "radio", name: "shape", value, disabled, checked: value === this.#onlySize(), onchange: () => this.#changed() }),
      el("span", {}, text));
    const many = (shape) => sizes.filter((each) => each.shape === shape);
    const name = ({ size, shape }) => {
      const short = shape ? t(`shape_${shape}`) : size.replace("x", " × ");
      return shape && many(shape).length > 1 ? `${short} (${size.replace("x", " × ")})` : short;
    };
    const missing = SHAPES.filter((shape) => !many(shape).length);
    at("shapes").replaceChildren(
      ...(sizes.length > 1 ? [radio("", t("shape_auto"))] : []),
      ...sizes.map((each) => radio(each.size, name(each), t("shape_size", { size: each.size.replace("x", " × ") }))),
      ...missing.map((shape) => radio(shape, t(`shape_${shape}`), "", true)),
    );
    const list = sizes.map(({ size }) => size.replace("x", " × ")).join(", ");
    at("shape-hint").textContent = missing.length ? t("shape_only", { sizes: list }) : "";
  }

  #onlySize() {
    return this.model.sizes.length > 1 ? "" : this.model.sizes[0].size;
  }

  #drawSettings() {
    at("settings").replaceChildren(...this.model.settings.map(({ key, kind, help, value, choices }) => {
      const shown = value === null || value === "" ? t("nothing") : [value].flat().join(", ");
      const common = { id: `set-${key}`, "aria-describedby": `help-${key} problem-${key}`, oninput: () => this.#changed() };
      const unset = t("advanced_unset", { value: shown });
      const options = () => [el("option", { value: "" }, unset), ...choices.map((choice) => el("option", { value: choice }, choice))];
      const field = kind === "choice" ? el("select", common, ...options())
        : kind === "text" ? el("textarea", { ...common, rows: 2, placeholder: shown.slice(0, 200) })
          : el("input", { ...common, type: "text", inputMode: kind === "whole" ? "numeric" : "text", autocomplete: "off", placeholder: shown });
      return el("div", { className: "setting" }, el("label", { for: `set-${key}` }, key), field,
        el("p", { className: "hint", id: `help-${key}` }, help), el("p", { className: "problem", id: `problem-${key}`, role: "alert" }));
    }));
  }

  #drawFixed() {
    at("fixed-settings").replaceChildren(...this.model.fixed.map(({ key, value, help }) => el("div", { className: "setting" },
      el("dt", {}, key), el("dd", {}, el("code", {}, value), el("p", { className: "hint" }, help)))));
  }

  #toggle(word, group) {
    const parts = at("prompt").value.split(",").map((part) => part.trim()).filter(Boolean);
    const kept = parts.filter((part) => !group.includes(part.toLowerCase()));
    const had = parts.some((part) => part.toLowerCase() === word);
    at("prompt").value = (had ? kept : [...kept, word]).join(", ");
    complain("prompt-problem", "", at("prompt"));
    this.#pressWords();
    this.#save();
  }

  #pressWords() {
    const parts = at("prompt").value.toLowerCase().split(",").map((part) => part.trim());
    for (const chip of document.querySelectorAll(".chip")) chip.setAttribute("aria-pressed", String(parts.includes(chip.textContent)));
  }

  #check(name, value) {
    for (const input of document.querySelectorAll(`[name=${name}]`)) input.checked = input.value === value;
  }

  #changed() {
    for (const { key } of this.model.settings) complain(`problem-${key}`, "", at(`set-${key}`));
    complain("size-problem");
    this.#save();
    this.changed();
  }

  #save() {
    const values = { model: this.model.id, prompt: at("prompt").value, intent: this.intent, size: this.size, settings: this.own };
    save(values);
  }
}

// The form of the last visit; a browser may forbid to keep it.
function load() {
  try {
    return JSON.parse(localStorage.getItem(SAVED)) ?? {};
  } catch {
    return {};
  }
}

function save(values) {
  try {
    localStorage.setItem(SAVED, JSON.stringify(values));
  } catch {
    // the page works without
  }
}

// A number, or the text itself, which the server then refuses in words.
function number(text) {
  const value = Number(text);
  return text.trim() && Number.isFinite(value) ? value : text.trim();
}

function matches(intent, settings) {
  return "num_steps" in intent ? intent.num_steps === settings.num_steps : settings.num_steps === undefined;
}
