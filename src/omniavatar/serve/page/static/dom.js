// Small helpers for elements.
export const at = (id) => document.getElementById(id);

// An element with properties; `data` and names with a dash become attributes.
export function el(tag, properties = {}, ...children) {
  const item = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.includes("-") || name === "role" || name === "for") item.setAttribute(name, value);
    else item[name] = value;
  }
  item.append(...children.filter((child) => child !== null && child !== undefined));
  return item;
}

// Shows what is wrong with a field, or nothing.
export function complain(id, text = "", field = null) {
  const place = at(id);
  if (place.textContent !== text) place.textContent = text;
  if (!field) return;
  if (text) field.setAttribute("aria-invalid", "true");
  else field.removeAttribute("aria-invalid");
}

// Shows one element for each value, in this order. Elements that were shown before stay, so they keep the focus.
// elements: a map from the id of a value to its element. make: makes the element of a new value.
export function arrange(list, elements, values, make) {
  const kept = new Set(values.map(({ id }) => id));
  for (const [id, element] of elements) {
    if (kept.has(id)) continue;
    element.remove();
    elements.delete(id);
  }
  values.forEach((value, place) => {
    if (!elements.has(value.id)) elements.set(value.id, make(value));
    const element = elements.get(value.id);
    if (list.children[place] !== element) list.insertBefore(element, list.children[place] ?? null);
  });
}

// Moves the focus from a control that has done its work, unless it was moved elsewhere meanwhile.
export function passFocus(from, to) {
  const active = document.activeElement;
  if (!active || active === document.body || active === from) to.focus();
}

// Calls `use` with the file that is dropped on an element.
export function onDrop(item, use) {
  const over = (event) => {
    event.preventDefault();
    item.classList.toggle("over", event.type === "dragover");
  };
  for (const name of ["dragover", "dragleave", "drop"]) item.addEventListener(name, over);
  item.addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (file) use(file);
  });
}

// A function that runs once, `wait` milliseconds after the last call.
export function later(run, wait) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(run, wait);
  };
}
