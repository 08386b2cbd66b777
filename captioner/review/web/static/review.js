// The review page: decisions, maps over the photo, the keyboard. Without it the page can be read.

const token = document.querySelector("meta[name=write-token]").content;
const message = document.getElementById("message");
const help = document.getElementById("help");
const articles = [...document.querySelectorAll("article")];
const UNDO = "captioner-undo";

function say(text) {
  message.textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { message.textContent = ""; }, 4000);
}

function show(article, state) {
  article.dataset.revision = state.revision;
  article.dataset.decision = state.decision ?? "";
  article.dataset.edited = state.caption ?? "";
  const badge = article.querySelector(".decision");
  badge.dataset.decision = badge.textContent = state.decision ?? "";
  article.querySelector(".caption bdi").textContent = state.caption ?? article.dataset.caption;
}

async function post(number, decision, caption, revision) {
  const response = await fetch(`/decision/${number}`, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Captioner-Token": token },
    body: JSON.stringify({ decision, caption, revision }),
  });
  if (response.status !== 200 && response.status !== 409) throw new Error(await response.text());
  return { conflict: response.status === 409, state: await response.json() };
}

function undos() {
  return JSON.parse(sessionStorage.getItem(UNDO) ?? "[]");
}

async function decide(article, decision, caption = null) {
  const { number, revision } = article.dataset;
  const before = { decision: article.dataset.decision || null, caption: article.dataset.edited || null };
  try {
    const { conflict, state } = await post(number, decision, caption, revision);
    show(article, state);
    if (conflict) {
      say("Decided elsewhere meanwhile: look again.");
      return false;
    }
    const entry = { number, before, revision: state.revision };
    sessionStorage.setItem(UNDO, JSON.stringify([...undos(), entry].slice(-200)));
    say(decision ? `Caption ${decision}.` : "Decision taken back.");
    return true;
  } catch (error) {
    say(`Not saved: ${error.message}`);
    return false;
  }
}

async function undo() {
  const entries = undos();
  const last = entries.pop();
  if (!last) return say("There is nothing to undo.");
  try {
    const { conflict, state } = await post(
      last.number, last.before.decision, last.before.caption, last.revision);
    for (const each of entries) {
      if (each.number === last.number) each.revision = state.revision;
    }
    sessionStorage.setItem(UNDO, JSON.stringify(entries));
    const article = articles.find((each) => each.dataset.number === last.number);
    if (article) show(article, state);
    say(conflict ? "Decided elsewhere meanwhile: not undone." : "Undone.");
  } catch (error) {
    say(`Not undone: ${error.message}`);
  }
}

function startEdit(article) {
  const form = article.querySelector("form.edit");
  if (!form) return;
  form.caption.value = article.dataset.edited || article.dataset.caption;
  form.hidden = false;
  form.caption.focus();
  form.caption.select();
}

function endEdit(article) {
  article.querySelector("form.edit").hidden = true;
  (article.tabIndex === 0 ? article : article.querySelector("[data-action=edit]")).focus();
}

async function saveEdit(article) {
  const text = article.querySelector("form.edit").caption.value.trim();
  if (!text) return say("A caption cannot be empty: reject it instead.");
  if (await decide(article, "edited", text)) endEdit(article);
}

const actions = {
  accept: (article) => decide(article, "accepted"),
  reject: (article) => decide(article, "rejected"),
  edit: startEdit,
  cancel: endEdit,
};

for (const article of articles) {
  article.addEventListener("click", (event) => {
    const action = event.target.closest("[data-action]")?.dataset.action;
    if (action) actions[action](article);
  });
  article.querySelector("form.edit")?.addEventListener("submit", (event) => {
    event.preventDefault();
    saveEdit(article);
  });
}

// Where the model looked: the map of the word under the pointer or with the keyboard's focus.
const map = document.getElementById("map");
for (const word of document.querySelectorAll("[data-map]")) {
  const look = () => { map.src = word.dataset.map; map.hidden = false; };
  const away = () => { map.hidden = document.activeElement !== word; };
  word.addEventListener("mouseenter", look);
  word.addEventListener("focus", look);
  word.addEventListener("mouseleave", away);
  word.addEventListener("blur", () => { map.hidden = true; });
}

function current() {
  return document.activeElement?.closest("article")
    ?? (articles.length === 1 ? articles[0] : null);
}

function move(step) {
  const link = document.querySelector(step > 0 ? "a[rel=next]" : "a[rel=prev]");
  if (document.querySelector("article.large")) return link?.click();
  const place = articles.indexOf(document.activeElement?.closest("article"));
  const next = articles[place < 0 ? 0 : place + step];
  next ? next.focus() : link?.click();
}

const keys = {
  j: () => move(1),
  k: () => move(-1),
  a: () => act("accept"),
  x: () => act("reject"),
  e: () => act("edit"),
  u: undo,
  "/": () => {
    const search = document.getElementById("search");
    search ? search.focus() : document.getElementById("back").click();
  },
  "?": () => help.showModal(),
};

function act(action) {
  const article = current();
  if (article?.querySelector(`[data-action=${action}]`)) actions[action](article);
}

document.addEventListener("keydown", (event) => {
  if (help.open) return;
  const typing = event.target.matches("input, textarea, select");
  if (typing) {
    if (event.key === "Escape" && event.target.matches("textarea")) endEdit(event.target.closest("article"));
    if (event.key === "Escape" && event.target.matches("input")) event.target.blur();
    if (event.key === "Enter" && event.target.matches("textarea") && !event.shiftKey) {
      event.preventDefault();
      saveEdit(event.target.closest("article"));
    }
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Enter" && event.target.matches("article")) event.target.querySelector(".open")?.click();
  if (event.key === "Escape") document.getElementById("back")?.click();
  if (keys[event.key]) {
    event.preventDefault();
    keys[event.key]();
  }
});

document.getElementById("show-help").addEventListener("click", () => help.showModal());

// An output that grows: say how far it is, and load the page again when its first rows are there.
const progress = document.getElementById("progress");
if (!progress.hidden) {
  const timer = setInterval(async () => {
    const state = await (await fetch("/progress")).json();
    const numbers = new Intl.NumberFormat("en");
    progress.textContent =
      `${numbers.format(state.rows)} of ${numbers.format(state.total)} images so far. ${state.problem ?? ""}`;
    if (state.complete && state.rows >= state.total) {
      clearInterval(timer);
      progress.textContent += "Reload to see all of them.";
    }
  }, 2000);
}
