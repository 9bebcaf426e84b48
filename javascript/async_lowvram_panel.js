/*
 * The panel: the line that is always there, and what it opens to.
 *
 * Problem: a user looks for ten seconds, and a screen reader must not speak every second. So the line is one row of text with the state
 * in the only live region (it changes when the state does), figures beside it, and everything else behind one button. Where the extension
 * does nothing, the line says why, and only advice, messages and the report stay behind the button.
 */
"use strict";
window.asyncLowvram = window.asyncLowvram || {};
(function(ours) {
    const h = (...given) => ours.element(...given);

    /** The panel over `client` (async_lowvram_client.js): {root, update(), setOpen(open)}. */
    ours.makePanel = function(client) {
        const {t} = ours;
        const state = h("span", {className: "alv-state", role: "status"});
        const figure = (id) => [id, h("span", {className: "alv-figure", "data-figure": id})];
        const figures = Object.fromEntries(["speed", "stock", "limit"].map(figure));
        const toggle = h("button", {
            type: "button", className: "alv-toggle", "aria-expanded": "false", "aria-controls": "async_lowvram_body",
        }, [h("span", {}, [t("Details")]), h("span", {className: "alv-chevron", "aria-hidden": "true"})]);
        const line = h("div", {className: "alv-line"}, [
            h("span", {className: "alv-words"}, [
                h("span", {className: "alv-said-now"}, [
                    h("span", {className: "alv-dot", "aria-hidden": "true"}), h("b", {className: "alv-name"}, ["Async LowVRAM"]), state,
                ]),
                h("span", {className: "alv-figures"}, Object.values(figures)),
            ]),
            toggle,
        ]);
        const notice = h("p", {className: "alv-notice", role: "status", hidden: true});

        const timeline = ours.makeTimeline();
        const trial = ours.makeTrial((start) => client.tryIt(start));
        const report = ours.makeReport(() => client.model);
        const vram = ours.vramSection(), passes = ours.passSection(), facts = ours.factSection();
        const advice = ours.adviceSection(), messages = ours.messageSection();
        const working = [vram, passes, facts]; // shown while it works; the others whenever they have something
        const buttons = h("div", {className: "alv-buttons"}, [...trial.buttons, ...report.buttons, trial.hint]);
        const body = h("div", {className: "alv-body", id: "async_lowvram_body", hidden: true}, [
            advice.root, buttons, trial.root, report.root, h("div", {className: "alv-columns"}, [vram.root, passes.root]), facts.root,
            timeline.root, messages.root,
        ]);
        const root = h("section", {className: "async-lowvram", id: "async_lowvram", "aria-label": "Async LowVRAM"}, [line, notice, body]);
        let kind = "";

        function setOpen(open) {
            toggle.setAttribute("aria-expanded", String(open));
            ours.show(body, open);
            client.setOpen(open);
            if (open) update();
        }

        function update() {
            const model = client.model, status = model.status, now = ours.stateOf(model);
            ours.setText(state, now.text);
            ours.setAttribute(root, "data-state", now.kind);
            const shown = now.kind === "unreachable" ? [] : ours.lineFigures(status);
            for (const [id, element] of Object.entries(figures)) {
                const figure = shown.find((one) => one.id === id);
                ours.show(element, Boolean(figure));
                if (figure) {
                    ours.setText(element, figure.text);
                    ours.setAttribute(element, "title", figure.hint);
                }
            }
            const restart = status && typeof status.restart === "string" ? status.restart : "";
            const newer = status && ours.known(status.schema) && status.schema > ours.SCHEMA;
            ours.setText(notice, restart ? t(restart) : newer ? t("The extension was updated: reload this page.") : "");
            ours.show(notice, Boolean(restart || newer));
            const folds = now.kind === "missing" || Boolean(status && !ours.works(status));
            if (kind && kind !== now.kind && folds && now.kind !== "unreachable") setOpen(false);
            kind = now.kind;
            if (body.hidden) return; // drawn when it is opened
            const works = Boolean(status) && !folds;
            for (const section of working) {
                ours.show(section.root, works);
                if (works) section.update(status);
            }
            ours.show(timeline.root, works);
            trial.update(works ? status.trial : null, model);
            for (const section of [advice, messages]) {
                if (status && now.kind !== "missing") section.update(status);
                else ours.show(section.root, false);
            }
        }

        line.addEventListener("click", (event) => {
            // The whole line opens it for a mouse, unless a text in it is being selected; the button is what the keyboard has.
            const selects = !event.target.closest("button") && String(window.getSelection());
            if (!selects) setOpen(toggle.getAttribute("aria-expanded") !== "true");
        });
        update();
        return {root, update, setOpen, showTimeline: () => timeline.show(client.model.timeline)};
    };
})(window.asyncLowvram);
