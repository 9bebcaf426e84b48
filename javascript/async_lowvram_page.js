/*
 * The panel in the WebUI's page: where it stands, whether it can be seen, and when a job runs.
 *
 * Problem: Gradio builds the page late, may build parts of it again, and keeps both tabs in the document. So one panel stands above the
 * result gallery of the tab that is visible, moves with it, and is put back if Gradio removes it. That a job runs is told by the WebUI's
 * own progress bar, an element that is there as long as the job: nothing is asked to find out.
 *
 * Called by the WebUI's onUiLoaded, onUiUpdate, onAfterUiUpdate and onUiTabChange; where they are missing, by an observer of our own.
 */
"use strict";
window.asyncLowvram = window.asyncLowvram || {};
(function(ours) {
    const TABS = ["txt2img", "img2img"];
    const app = () => (typeof window.gradioApp === "function" ? window.gradioApp() : document);

    /** What the panel stands before, in each tab that has it: above the gallery, where it is seen without scrolling. */
    function anchors() {
        const found = [];
        for (const tab of TABS) {
            for (const id of [`${tab}_results_panel`, `${tab}_gallery_container`]) {
                const anchor = app().querySelector(`#${id}`);
                if (anchor) {
                    found.push(anchor);
                    break;
                }
            }
        }
        return found;
    }

    const isShown = (element) => element.getClientRects().length > 0;

    function start() {
        if (ours.panel) return;
        let panel = null, crossing = false;
        const client = ours.makeClient((what) => (what === "timeline" ? panel.showTimeline() : panel.update()));
        panel = ours.panel = ours.makePanel(client);
        ours.client = client;
        const root = panel.root, watched = new Set();

        function look() {
            const placed = root.isConnected && isShown(root);
            client.setSight(document.visibilityState === "visible" && placed && (crossing || !window.IntersectionObserver));
        }

        const observer = window.IntersectionObserver && new IntersectionObserver((entries) => {
            for (const entry of entries) if (entry.target === root) crossing = entry.isIntersecting;
            place(); // an anchor came into sight: its tab was chosen
        });
        if (observer) observer.observe(root);

        function place() {
            const all = anchors();
            if (observer) {
                for (const anchor of all) {
                    if (watched.has(anchor)) continue;
                    watched.add(anchor);
                    observer.observe(anchor);
                }
                for (const anchor of watched) {
                    if (anchor.isConnected) continue;
                    watched.delete(anchor);
                    observer.unobserve(anchor);
                }
            }
            const anchor = all.find(isShown) || (root.isConnected ? null : all[0]);
            if (anchor && root.nextElementSibling !== anchor) {
                const focused = root.contains(document.activeElement) ? document.activeElement : null;
                anchor.before(root);
                if (focused) focused.focus(); // an element that is moved loses it
            }
            look();
        }

        /** After each change of the page: cheap, for there are many. */
        function changed() {
            if (!root.isConnected) place();
            client.setJob(Boolean(app().querySelector(".progressDiv")));
        }

        document.addEventListener("visibilitychange", look);
        if (typeof window.onUiUpdate === "function") {
            window.onUiUpdate(changed);
            if (typeof window.onAfterUiUpdate === "function") window.onAfterUiUpdate(place);
            if (typeof window.onUiTabChange === "function") window.onUiTabChange(place);
        } else {
            new MutationObserver(() => {
                changed();
                place();
            }).observe(document.body, {childList: true, subtree: true});
        }
        place();
        changed();
    }

    if (typeof window.onUiLoaded === "function") window.onUiLoaded(start);
    else if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
    else start();
})(window.asyncLowvram);
