// Rendering of user messages and replies.

import { render } from "./api.js";
import { textOf } from "./store.js";

const RENDER_INTERVAL = 60; // milliseconds between renderings of a streaming text

export function add(parent, tag, className = "", text = "") {
  const node = parent.appendChild(document.createElement(tag));
  node.className = className;
  node.textContent = text;
  return node;
}

// Text of people and models, whose first letter decides whether it runs from right to left.
export function addText(parent, tag, className, text = "") {
  const node = add(parent, tag, className, text);
  node.dir = "auto";
  return node;
}

export function iconButton(parent, icon, label, action) {
  const button = add(parent, "button", "icon");
  button.type = "button";
  button.title = label;
  button.setAttribute("aria-label", label);
  button.innerHTML = `<svg aria-hidden="true"><use href="#i-${icon}"/></svg>`;
  button.addEventListener("click", () => action(button));
  return button;
}

export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // the clipboard API requires https or localhost
    const area = add(document.body, "textarea", "", text);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const use = button.querySelector("use");
  use.setAttribute("href", "#i-done");
  setTimeout(() => use.setAttribute("href", "#i-copy"), 1200);
}

// A user message with copy and edit buttons. `actions`: {edit(text)}.
export class UserTurn {
  constructor(parent, text, actions) {
    this.text = text;
    this.actions = actions;
    this.node = add(parent, "article", "turn user");
    this.node.setAttribute("aria-label", "You");
    this.show();
  }

  show() {
    this.node.replaceChildren();
    addText(this.node, "div", "bubble", this.text);
    const tools = add(this.node, "div", "tools");
    iconButton(tools, "copy", "Copy", (button) => copy(this.text, button));
    iconButton(tools, "edit", "Edit", () => this.edit());
  }

  edit() {
    this.node.replaceChildren();
    const form = add(this.node, "form", "editor");
    const area = addText(form, "textarea", "", this.text);
    area.setAttribute("aria-label", "Edit message");
    const buttons = add(form, "div", "buttons");
    const cancel = add(buttons, "button", "quiet", "Cancel");
    cancel.type = "button";
    const send = add(buttons, "button", "primary", "Send");
    const fit = () => {
      area.style.height = "auto";
      area.style.height = `${area.scrollHeight}px`;
      send.disabled = !area.value.trim();
    };
    area.addEventListener("input", fit);
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        this.show();
      }
    });
    cancel.addEventListener("click", () => this.show());
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (area.value.trim()) this.actions.edit(area.value.trim());
    });
    fit();
    area.focus();
  }
}

// A reply: text as Markdown, tool calls as collapsible steps. `actions`: {regenerate()}.
export class ReplyTurn {
  constructor(parent, actions, parts = []) {
    this.parts = [];
    this.views = [];
    this.actions = actions;
    this.node = add(parent, "article", "turn assistant");
    this.node.setAttribute("aria-label", "Reply");
    for (const { type, text } of parts) this.add(type, text, false);
  }

  // `now`: render immediately. The texts of a stored conversation are rendered in one request instead.
  add(type, text, now = true) {
    if (this.parts.at(-1)?.type !== type) {
      this.parts.push({ type, text: "" });
      this.views.push(this.open(type));
    }
    const part = this.parts.at(-1);
    part.text += text;
    this.views.at(-1).show(part.text, now);
  }

  open(type) {
    if (type === "text") return new Text(this.node);
    if (type === "python") {
      const step = add(this.node, "details", "step");
      step.open = true;
      add(step, "summary", "", "Ran Python");
      this.step = step;
    }
    const parent = this.step ?? this.node;
    const label = type === "python" ? "Code" : "Result";
    const pre = add(parent, "pre", type === "python" ? "code" : "result");
    pre.setAttribute("aria-label", label);
    return {
      show(text) {
        pre.textContent = text;
        pre.classList.toggle("failed", type === "python_output" && text.startsWith("error:"));
      },
    };
  }

  note(text, className = "") {
    add(this.node, "div", `note ${className}`, text);
  }

  texts() {
    return this.views.filter((view) => view instanceof Text);
  }

  // Finishes the reply: adds buttons and statistics.
  async end(stats) {
    await Promise.all(this.texts().map((view) => view.settle()));
    this.node.classList.remove("waiting");
    const tools = add(this.node, "div", "tools");
    if (this.parts.length) iconButton(tools, "copy", "Copy", (button) => copy(textOf(this.parts), button));
    iconButton(tools, "again", "Regenerate", () => this.actions.regenerate());
    if (stats?.tokens) {
      const speed = stats.speed ? `, ${stats.speed.toFixed(stats.speed < 10 ? 1 : 0)} tokens/s` : "";
      const label = add(tools, "span", "stats", `${stats.tokens} tokens${speed}`);
      label.title = [stats.model, stats.wait && `first token after ${stats.wait.toFixed(2)} s`].filter(Boolean).join(", ");
    }
  }
}

// A Markdown text, rendered by the server several times per second while it grows.
class Text {
  constructor(parent) {
    this.node = addText(parent, "div", "text");
    this.text = "";
    this.shown = "";
    this.busy = null;
  }

  show(text, now) {
    this.text = text;
    if (now) this.busy ??= this.follow();
    else this.node.textContent = text;
  }

  async follow() {
    while (this.shown !== this.text) {
      const text = this.text;
      try {
        this.put((await render([text]))[0]);
      } catch { // server unreachable: show the plain text
        this.node.textContent = text;
      }
      this.shown = text;
      await new Promise((resolve) => setTimeout(resolve, RENDER_INTERVAL));
    }
    this.busy = null;
  }

  put(html) {
    this.shown = this.text;
    following(() => {
      this.node.innerHTML = html; // from /render, which escapes the model's markup
      for (const styled of this.node.querySelectorAll("[data-style]")) styled.style.cssText = styled.dataset.style;
      for (const pre of this.node.querySelectorAll("pre")) {
        const code = pre.textContent;
        iconButton(pre, "copy", "Copy code", (button) => copy(code, button));
      }
    });
  }

  async settle() {
    await this.busy;
  }
}

// Runs `change` and scrolls to the end, unless the user has scrolled up.
export function following(change) {
  const scroll = document.getElementById("scroll");
  const atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  change();
  if (atEnd) scroll.scrollTop = scroll.scrollHeight;
}

// Renders the texts of several turns in one request.
export async function renderAll(turns) {
  const texts = turns.flatMap((turn) => turn.texts());
  if (!texts.length) return;
  try {
    const html = await render(texts.map((view) => view.text));
    texts.forEach((view, i) => view.put(html[i]));
  } catch {
    // Keep the plain text.
  }
}
